"""Several documents in a row are what each is alone: loss and gradients, from all logits at once and by chunks."""

import functools

import jax
import numpy as np
import pytest

from research.peft import method as peft
from research.peft import tree
from research.tasks import lm
from tests import tiny

LENGTHS = (5, 4, 3, 6)
ROWS = ((0, 1, 2), (3,))  # which document lies in which row


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(1, tiny.VOCAB, n).astype(np.int32) for n in LENGTHS]


def unpacked(docs: list[np.ndarray]) -> dict[str, np.ndarray]:
    tokens, mask = np.zeros((2, len(docs), tiny.LENGTH), np.int32)
    for row, doc in enumerate(docs):
        tokens[row, : len(doc)], mask[row, : len(doc)] = doc, 1
    return {"tokens": tokens, "mask": mask, "segments": mask}


def packed(docs: list[np.ndarray]) -> dict[str, np.ndarray]:
    tokens, segments = np.zeros((2, len(ROWS), tiny.LENGTH), np.int32)
    for row, numbers in enumerate(ROWS):
        start = 0
        for segment, number in enumerate(numbers, 1):
            place = slice(start, start + len(docs[number]))
            tokens[row, place], segments[row, place] = docs[number], segment
            start = place.stop
    return {"tokens": tokens, "mask": (segments > 0).astype(np.int32), "segments": segments}


@functools.cache
def program(spec: str, chunk: int | None = None):
    case = tiny.case(spec, "decoder")
    loss = lm.loss(case.model, chunk)
    trainable, frozen = tree.partition(case.point, case.mask)

    def mean(trainable, batch):
        variables = peft.realised(case.method, tree.combine(trainable, frozen), case.sites)
        out = loss(variables, batch, None)
        return out.sum / out.weight, out.weight

    return jax.jit(jax.value_and_grad(mean, has_aux=True)), trainable


@pytest.mark.parametrize("spec", ["lora", "prefix:length=3+prompt:length=2", "full"], ids=lambda s: f"{s}-decoder")
def test_packed_is_unpacked(spec):
    run, trainable = program(spec)
    apart, together = run(trainable, unpacked(documents())), run(trainable, packed(documents()))
    assert apart[0][1] == sum(LENGTHS) - len(LENGTHS) == together[0][1]
    tiny.close(together, apart, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["lora", "full"], ids=lambda s: f"{s}-decoder")
def test_chunks_are_all_logits_at_once(spec):
    (run, trainable), (chunked, _) = program(spec), program(spec, 5)  # which divides neither rows nor tokens
    batch = packed(documents()) | {"weight": np.float32([1, 3])}
    tiny.close(chunked(trainable, batch), run(trainable, batch), 1e-5)


@pytest.mark.slow
def test_a_row_of_weight_zero_counts_nothing():
    run, trainable = program("lora")
    batch = packed(documents())
    alone, first = (run(trainable, batch | {"weight": np.float32(w)})[0] for w in ([1, 0], [2, 0]))
    assert alone[1] == sum(LENGTHS[:3]) - 3 == first[1] / 2
    np.testing.assert_allclose(alone[0], first[0], rtol=1e-6)
    other = batch | {"tokens": np.where([[True], [False]], batch["tokens"], 3), "weight": np.float32([1, 0])}
    assert run(trainable, other)[0][0] == alone[0]


@pytest.mark.slow
def test_without_segments_documents_see_each_other():
    case = tiny.case("lora", "decoder")
    loss, batch = lm.loss(case.model), packed(documents())
    leaky = loss(case.point, {k: v for k, v in batch.items() if k != "segments"}, None)
    assert abs(float(leaky.sum - loss(case.point, batch, None).sum)) > 0.1


def test_editing_a_document_leaves_its_neighbours_alone():
    case, docs = tiny.case("lora", "decoder"), documents()
    point = case.point  # made here: inside jit it would be traced
    score = jax.jit(lambda b: lm.loss(case.model)(point, b, None).outputs[0])
    before = np.asarray(score(packed(docs)))
    docs[1] = docs[1][::-1].copy()
    after = np.asarray(score(packed(docs)))
    changed = np.abs(after - before).max(-1) > 1e-6
    assert changed[0, 5:9].any()
    assert not changed[0, :5].any() and not changed[0, 9:12].any() and not changed[1].any()
