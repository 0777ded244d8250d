"""LT-SFT: sparse fine-tuning of a lottery ticket (Ansell et al., arXiv 2110.07560).

    theta_1 = full fine-tuning of theta_0;    those theta_i train, from theta_0 again, whose |theta_1 - theta_0| are the
                                              largest

    in training  peft {"reparam": {"lt_sft": Elements(chosen={"layers": {"attn": {"q": {"kernel": bool[L, in, out]}}},
                                                              "embed": ...})}}
    realised     nothing is added

`fit` is the first phase: Adam on base and head at the authors' rate of 5e-5, which falls to 0, with dropout; then base
and head are what they were. The paper's first phase is as long as the second: give `steps` the length of the run for
that. One round of choosing, as is the authors' default, and without their optional L1 penalty on theta - theta_0.
Composition, theta_0 + phi_task + phi_language, is the sum of two adapters' changes. A quantised base is refused.
"""

from collections.abc import Callable

import jax

from research.peft import tree
from research.peft.elements import changes, check_fraction, check_phase, from_data, highest, share_of
from research.peft.method import Card, Method, PyTree, Variables

CARD = Card(paper="2110.07560", kind="selective", memory="maybe", inference="none", small="fraction=0.02,steps=3")


def lt_sft(fraction: float = 0.01, steps: int = 100, learning_rate: float = 5e-5) -> Method:
    """Trains the elements of the base that full fine-tuning moves most.

    Args:
        fraction: the share of all parameters of the base that trains.
        steps: of the first phase.
        learning_rate: of the first phase.
    Raises FlagError for a value out of range.
    """
    check_fraction(fraction)
    check_phase(steps, learning_rate)

    def choose(rng: jax.Array, variables: Variables, loss: Callable, data: Callable) -> PyTree:
        moved = changes(rng, variables, loss, data, steps, learning_rate)
        return highest(moved, share_of(fraction, tree.count(variables["params"])))

    return from_data("lt_sft", choose)
