"""Full fine-tuning: every parameter of the base trains.

    before  {"params": base}
    after   {"params": base (all trained)}

The baseline of every table, and a method like any other.
"""

from research.peft.method import Card, Method, base_leaves

CARD = Card("-", "selective", memory="no", inference="none")


def full() -> Method:
    """Trains the whole base; nothing is added."""
    return Method(init=lambda rng, sites: {}, trainable=lambda variables: base_leaves(".*", variables))
