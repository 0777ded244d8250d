"""Linear probe: nothing but the task's head trains.

    before  {"params": base, "head": ...}
    after   {"params": base, "head": ... (trained)}

The floor of every table.
"""

from research.peft.method import Card, Method

CARD = Card("-", "selective", memory="yes", inference="none")


def linear_probe() -> Method:
    """Adds nothing and trains nothing of the base; refused where there is no head."""
    return Method(init=lambda rng, sites: {})
