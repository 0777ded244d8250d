"""The planner on devices that are there: what it compiles, counts and refuses. No libtpu is needed."""

import dataclasses

import jax
import pytest

from research.errors import FlagError
from research.models.registry import preset
from research.peft import method as peft
from research.train.count import matmul_flops
from tpu import chips, plan, plans, steps
from tpu.steps import Job, analytic_flops, parts


@pytest.fixture(autouse=True)
def four_chips(monkeypatch):
    monkeypatch.setattr(chips, "devices", lambda topology: jax.devices()[:4])


def job(**changes) -> Job:
    return Job(
        **({"model": "smollm2-135m", "peft": "lora:rank=8", "topology": "v5e:2x2", "batch": 8, "seq": 64} | changes)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"remat": "none"},
        {"peft": "lora:rank=8,targets=all", "seq": 256},
        {"model": "llama3-8b", "peft": "lora:rank=16", "seq": 512},
        {"chunk": 64},
    ],
    ids=str,
)
def test_the_steps_products_are_those_counted_by_hand(changes):
    made = job(**changes)
    step, arguments, _, _ = plan.program(made, "fsdp:4", 2)
    counted = matmul_flops(jax.make_jaxpr(step)(*arguments).jaxpr)
    assert counted == pytest.approx(analytic_flops(made, peft.base(parts(made, 2).model)[0]), rel=0.05)


@pytest.mark.slow
def test_a_kernel_hides_no_products():
    found = plan.plan(job(attention="splash", seq=128, batch=4), "fsdp:4")
    step, arguments, _, mesh = plan.program(job(seq=128, batch=4), "fsdp:4", 1)
    assert found["flops"] == matmul_flops(jax.make_jaxpr(step)(*arguments).jaxpr) / mesh.size
    with pytest.raises(FlagError, match="LLaMA and GPT-2: dit has 'xla'"):
        parts(job(task="dit", model="dit-s8", attention="splash"), 1)


def row(spec: str, micro: int, fits: bool, seconds: float) -> dict:
    return {"mesh": spec, "micro_batches": micro, "fits": fits} | ({"roofline": seconds} if fits else {})


def test_suggestions_are_the_likeliest_and_the_quickest_that_fit_come_first(monkeypatch):
    times = iter([3.0, 1.0, 2.0, 4.0])
    made = []

    def compiled(job: Job, spec: str, micro: int) -> dict:
        made.append((spec, micro))
        seconds = next(times)
        return row(spec, micro, seconds != 1.0, seconds)

    monkeypatch.setattr(plan, "plan", compiled)
    found = plan.suggest(job(), 4)
    assert [p.get("roofline") for p in found] == [2.0, 3.0, 4.0, None]
    # The fewest micro-batches without tensor parallelism, then the next.
    assert made == [(f"data:{d},fsdp:{4 // d},tensor:1", m) for m in (1, 2) for d in (1, 2, 4)][:4]


def test_a_base_that_fits_nowhere(monkeypatch):
    monkeypatch.setattr(chips, "chip", lambda topology: chips.CHIPS["v5e"]._replace(hbm=1))
    with pytest.raises(FlagError, match="fits on no mesh of v5e:2x2: take a larger slice"):
        plan.suggest(job(), 1)


def test_no_chip_holds_more_than_its_share_of_the_base():
    _, (start, frozen, _), places, mesh = plan.program(job(model="llama3-70b"), "fsdp:4", 1)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(frozen))
    assert plan.resident(start, frozen, places)["base"] <= 1.05 * whole / mesh.size


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"task": "grpo", "chunk": 64}, {"task": "dit", "model": "dit-s8", "batch": 16}],
    ids=["lm", "grpo", "dit"],
)
def test_a_plan_is_the_compiled_step(changes):
    found = plan.plan(job(**changes), "data:2,fsdp:2")
    assert found["fits"] and found["flops"] > 0 and found["collectives"]
    assert set(found["memory"]) == {"base", "trainable", "optimiser", "activations"}
    text = plan.table(found)
    assert "fits" in text and ("images/s" if changes.get("task") == "dit" else "tokens/s") in text


@pytest.mark.parametrize(
    ("changes", "mesh", "words"),
    [
        ({"batch": 6}, "fsdp:4", "batch=6 is not divided .* Valid: 8"),
        ({}, "fsdp:3", "3 places for 4 devices. Valid"),
        ({}, "fdsp:4", "unknown axis 'fdsp'. Did you mean 'fsdp'"),
        ({"task": "dit"}, "", "'dit' is not for model 'smollm2-135m'. Valid: dit-xl2"),
        ({"model": "dit-s2"}, "", "'lm' is not for model 'dit-s2'"),
        ({"model": "bert-base"}, "", "no decoder"),
        ({"task": "ml"}, "", "unknown task 'ml'. Valid: dit, grpo, lm"),
    ],
)
def test_what_cannot_be_planned_is_one_line(changes, mesh, words):
    with pytest.raises(FlagError, match=words):
        plan.program(job(**changes), mesh, 1)


def test_a_topology_that_is_none(monkeypatch):
    monkeypatch.undo()
    for topology, words in (("v5x:2x2", "unknown chip 'v5x'"), ("v5e", "has no shape, as in v5e:2x2")):
        with pytest.raises(FlagError, match=words):
            chips.devices(topology)


def test_a_topology_that_libtpu_rejects(monkeypatch):
    from jax.experimental import topologies

    monkeypatch.undo()

    def reject(**_):
        raise RuntimeError("INVALID_ARGUMENT: Invalid chip topology\nmore")

    monkeypatch.setattr(topologies, "get_topology_desc", reject)
    with pytest.raises(FlagError, match="Invalid chip topology. Valid: v5e:2x2, v5e:2x4, .*v5e:16x16") as told:
        chips.devices("v5e:3x3")
    assert "\n" not in str(told.value)


@pytest.mark.slow
def test_the_page_of_plans_is_read_back_row_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "versions", lambda: "jax 1, libtpu 2")
    made = plan.plan(job(task="dit", model="dit-s8", batch=16), "data:4")
    cells = plans.cells(job(task="dit", model="dit-s8", batch=16), made)
    assert len(cells) == len(plans.HEADS)
    page = tmp_path / "plans.md"
    page.write_text(plans.text({plans.PLANS[0]: cells, plans.PLANS[3]: cells}))
    assert plans.kept(page) == {plans.PLANS[0]: cells, plans.PLANS[3]: cells}
    monkeypatch.setattr(plans, "versions", lambda: "jax 1, libtpu 3")
    assert plans.kept(page) == {}


def test_the_committed_page_has_every_plan():
    page = plans.PAGE.read_text(encoding="utf-8")
    assert all(f"`{line}` |" in page for line in plans.PLANS)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:4", "fsdp:4", "data:2,tensor:2"])
def test_the_compiled_step_runs_no_more_products_than_counted_by_hand(mesh, monkeypatch):
    """Unrolled, so that XLA counts every layer: work that the partitioner repeats on several chips, or a gradient of a
    frozen kernel, would show.
    """
    shape = {"num_layers": 6, "hidden_size": 256, "intermediate_size": 704, "num_heads": 4, "num_kv_heads": 2}
    config = dataclasses.replace(preset("smollm2-135m"), **shape, vocab_size=1024, scan=False)
    monkeypatch.setattr(steps, "preset", lambda name: config)
    made = job(seq=256, dtype="float32", base_dtype="float32")
    by_hand = analytic_flops(made, peft.base(parts(made, 1).model)[0])
    assert plan.plan(made, mesh)["xla_flops"] * 4 == pytest.approx(by_hand, rel=0.05)
