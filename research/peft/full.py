"""Full fine-tuning: every parameter of the base trains. The baseline of every table, and a method like any other.

before  {"params": base}
after   {"params": base (all trained)}
"""

from research.peft.method import Method, base_leaves


def full() -> Method:
    """Trains the whole base; nothing is added."""
    return Method(init=lambda rng, sites: {}, trainable=lambda variables: base_leaves(".*", variables))
