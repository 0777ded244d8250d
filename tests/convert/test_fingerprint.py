"""What a fingerprint is sensitive to, and what it is not."""

import dataclasses
import time

import jax.numpy as jnp
import numpy as np
import pytest

from research.convert.fingerprint import fingerprint
from research.models.bert import BertConfig
from research.models.llama import LlamaConfig


def tree() -> dict:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 4, 5)).astype(np.float32)
    return {"embed": {"embedding": np.arange(6.0).reshape(2, 3)}, "layers": {"q": {"kernel": kernel}}}


def test_scanned_and_unrolled_are_the_same():
    scanned = tree()
    unrolled = {"embed": scanned["embed"]} | {
        f"layers_{i}": {"q": {"kernel": jnp.asarray(x)}} for i, x in enumerate(scanned["layers"]["q"]["kernel"])
    }
    assert fingerprint(scanned) == fingerprint(unrolled)
    unrolled["layers_0"], unrolled["layers_1"] = unrolled["layers_1"], unrolled["layers_0"]
    assert fingerprint(scanned) != fingerprint(unrolled)


def test_memory_layout_does_not_matter():
    other = tree()
    other["embed"]["embedding"] = np.asfortranarray(other["embed"]["embedding"])
    assert fingerprint(other) == fingerprint(tree())


def one_bit(t):
    t["layers"]["q"]["kernel"].view(np.uint32)[2, 3, 4] ^= 1


def negative_zero(t):
    t["embed"]["embedding"][0, 0] = -0.0


def shape(t):
    t["embed"]["embedding"] = t["embed"]["embedding"].reshape(3, 2)


def dtype(t):
    t["embed"]["embedding"] = t["embed"]["embedding"].view(np.int64)


def name(t):
    t["embed"]["table"] = t["embed"].pop("embedding")


@pytest.mark.parametrize("change", [one_bit, negative_zero, shape, dtype, name])
def test_any_change_shows(change):
    changed = tree()
    change(changed)
    assert fingerprint(changed) != fingerprint(tree())


def test_bfloat16_and_scalars():
    a, b = {"x": jnp.ones((3,), jnp.bfloat16), "s": np.float32(1)}, {"x": jnp.ones((3,)), "s": np.float32(1)}
    assert len(fingerprint(a)) == 64 and fingerprint(a) != fingerprint(b)


def test_quick_enough_for_a_hundred_million_bytes():
    big = {f"layers_{i}": {"w": np.full((1000, 2500), i, np.float32)} for i in range(10)}
    start = time.perf_counter()
    fingerprint(big)
    assert time.perf_counter() - start < 2


CONFIG = LlamaConfig(64, 16, 2, 4, 2, 4, 32, rope_scaling=("llama3", 8.0, 1.0, 4.0, 8192))


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": None},
        {"rope_scaling": ("llama3", 32.0, 1.0, 4.0, 8192)},
        {"rope_theta": 5e5},
        {"norm_eps": 1e-6},
        {"sliding_window": 8},
        {"num_kv_heads": 4},
    ],
)
def test_the_same_weights_under_another_function_are_another_base(change):
    other = dataclasses.replace(CONFIG, **change)
    assert len({fingerprint(tree()), fingerprint(tree(), CONFIG), fingerprint(tree(), other)}) == 3


def test_another_activation_is_another_base():
    assert fingerprint(tree(), BertConfig()) != fingerprint(tree(), BertConfig(activation="relu"))


def test_how_a_function_is_computed_and_written_down_does_not_matter():
    other = dataclasses.replace(
        CONFIG, dtype="bfloat16", param_dtype="bfloat16", scan=False, remat="full", family="mistral",
        norm_eps=float(np.float32(CONFIG.norm_eps)), rope_theta=10000, rope_scaling=["llama3", 8, 1, 4, 8192.0],
    )  # fmt: skip
    assert fingerprint(tree(), other) == fingerprint(tree(), CONFIG)
