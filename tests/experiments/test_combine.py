"""`experiments.combine` on the tiny models: what it writes loads, and is the sum."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.convert.load import load
from research.peft import adapter, registry, tree
from research.peft import method as peft
from research.peft.merge import merge
from tests import tiny
from tests.experiments.script import refused, run

CLASSES = ["negative", "positive"]
CHOSEN = ("fishmask", "far")  # whose node says what trains


@functools.cache
def smoke(name: str):
    base = load(name)
    return base, peft.sites(base.model)


def write(where: Path, spec: str, seed: int, model: str = "smoke", head: bool = False, **meta) -> str:
    """An adapter that has trained nowhere, but moved."""
    base, sites = smoke(model)
    method = registry.parse(spec)
    variables = {"params": base.params, "peft": peft.init(method, jax.random.key(seed), sites)}
    if head:
        variables["head"] = {"kernel": jnp.full((32, 2), float(seed)), "bias": jnp.zeros(2)}
    if (name := spec.partition(":")[0]) in CHOSEN:
        rng, node = np.random.default_rng(seed), variables["peft"]["reparam"][name]
        marks = node.chosen if isinstance(node.chosen, dict) else base.params
        marks = jax.tree.map(lambda x: rng.random(x.shape) < 0.1, marks)
        variables["peft"] = {"reparam": {name: node.replace(chosen=marks)}}
    mask = peft.mask(method, variables)
    moved = tiny.noise({k: variables[k] for k in ("params", "peft")}, 0.1, seed)
    new = lambda a, b, m: jnp.where(m, a, b) if tree.trains(m) else b  # noqa: E731
    variables |= {k: jax.tree.map(new, moved[k], variables[k], mask[k]) for k in moved}
    adapter.save(where, spec, variables, sites, {"name": model, "fingerprint": base.fingerprint}, **meta)
    return str(where)


def read(where: str | Path, model: str = "smoke") -> tuple[dict, dict]:
    """(realised variables, metadata)."""
    base, sites = smoke(model)
    loaded = adapter.load(where)
    return peft.realised(
        loaded.method, adapter.attach(loaded, base.params, sites, base.fingerprint), sites
    ), loaded.meta


def deltas(variables: dict, model: str = "smoke") -> dict[str, np.ndarray]:
    base = tree.paths(smoke(model)[0].params)
    return {path: np.asarray(x) - np.asarray(base[path]) for path, x in tree.paths(merge(variables)["params"]).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("specs", "written", "model"),
    [
        (
            ("lora:rank=2", "lora:rank=3,targets=attn/q"),
            "lora:rank=5,rank_pattern=layers/attn/v:2,alpha=5,alpha_pattern=layers/attn/v:2,",
            "smoke",
        ),
        (("rslora:rank=2+bitfit",) * 2, "lora:rank=4,alpha=4,targets=attn/q|attn/v+bitfit", "smoke"),
        (("dora:rank=2,layers=1",) * 2, "dora:rank=4,alpha=4,targets=attn/q|attn/v,layers=1", "smoke-llama"),
        (("hira:rank=2",) * 2, "hira:rank=4,scale=1,targets=attn/q|attn/v", "smoke-llama"),
        (("ia3",) * 2, "ia3", "smoke-llama"),
        (("vera:rank=4", "miss:rank=3"), "lora:rank=7,alpha=7,targets=attn/q|attn/v", "smoke"),
        (("fishmask",) * 2, "fishmask", "smoke"),
        (("far",) * 2, "far", "smoke"),
        (("last_layers:count=2", "last_layers:count=2"), "last_layers:count=2", "smoke"),
    ],
)
def test_what_is_written_is_the_sum(specs, written, model, tmp_path):
    each = [write(tmp_path / f"{i}", spec, i + 1, model) for i, spec in enumerate(specs)]
    out = tmp_path / "sum"
    done = run("combine", f"--adapters={','.join(each)}", "--weights=0.5,-2", f"--output={out}")
    assert done.status == 0, done.err
    total, meta = read(out, model)
    assert meta["spec"].startswith(written) and meta["spec"] in done.out
    assert meta["combined"]["how"] == "linear" and meta["combined"]["weights"] == [0.5, -2.0]
    one, two = (deltas(read(directory, model)[0], model) for directory in each)
    for path, found in deltas(total, model).items():
        np.testing.assert_allclose(found, 0.5 * one[path] - 2 * two[path], atol=2e-5, err_msg=path)


def test_widths_add_up_and_one_adapter_stays_what_it_is(tmp_path):
    a, b = (write(tmp_path / f"{i}", f"houlsby:std=0.02,width={3 + i},norms=false", i) for i in range(2))
    assert run("combine", f"--adapters={a},{b}", "--weights=1,1", f"--output={tmp_path / 'c'}").status == 0
    assert read(tmp_path / "c")[1]["spec"] == "houlsby:std=0.02,width=7,norms=false"
    prompt = write(tmp_path / "p", "prompt:length=3", 1)
    assert run("combine", f"--adapters={prompt}", "--weights=1", f"--output={tmp_path / 'q'}").status == 0
    before, after = read(prompt), read(tmp_path / "q")
    assert tiny.same(before[0], after[0]) and before[1]["spec"] == after[1]["spec"]


def test_options_reach_the_sum_and_the_head_keeps_its_classes(tmp_path):
    meta = {"task": "classify", "classes": CLASSES, "max_length": 16}
    a, b = (write(tmp_path / f"{i}", "lora:rank=4", i, head=True, **meta) for i in range(2))
    common = [f"--adapters={a},{b}", "--weights=1,1", f"--output={tmp_path / 'c'}"]
    refused(run("combine", *common), 2, "different task heads", "head=0")
    done = run("combine", *common, "--how=dare_ties", "--density=0.5", "--seed=3", "--rank=5", "--head=1")
    assert done.status == 0, done.err
    total, found = read(tmp_path / "c")
    assert found["spec"] == "lora:rank=5,alpha=5,targets=attn/q|attn/v" and found["classes"] == CLASSES
    assert np.all(np.asarray(total["head"]["kernel"]) == 1.0)
    other = run("classify", f"--adapter={tmp_path / 'c'}", "--mode=predict", stdin="a line\n")
    assert json.loads(other.out)["label"] in CLASSES


@pytest.mark.parametrize(
    ("specs", "arguments", "status", "words"),
    [
        (("lora", "lora"), ["--weights=1"], 2, ["1 weights for 2 adapters"]),
        (("lora", "lora"), ["--weights=1,x"], 2, ["--weights=1,x", "not all numbers"]),
        (("lora", "lora"), ["--weights=1,1", "--how=sum"], 2, ["unknown how=sum"]),
        (("lora", "lora"), ["--weights=1,1", "--rank=2"], 2, ["how=linear does not use rank=2"]),
        (("prefix:hidden=0", "prefix:hidden=0"), ["--weights=1,1"], 4, ["no weighted sum"]),
        (("lora", "lora+bitfit"), ["--weights=1,1"], 4, ["chains of different lengths"]),
        (("bitfit:targets=attn/q", "bitfit"), ["--weights=1,1"], 4, ["does not hold the sum", "bias is lost"]),
        (("pfeiffer", "pfeiffer:targets=attn_residual"), ["--weights=1,1"], 4, ["the sum is no pfeiffer"]),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(specs, arguments, status, words, tmp_path):
    each = [write(tmp_path / f"{i}", spec, i) for i, spec in enumerate(specs)]
    outcome = run("combine", f"--adapters={','.join(each)}", *arguments, f"--output={tmp_path / 'sum'}")
    refused(outcome, status, *words)
    assert not (tmp_path / "sum").exists()


def test_other_bases_and_missing_directories(tmp_path):
    ours, theirs = write(tmp_path / "0", "lora:rank=2", 0), write(tmp_path / "1", "lora:rank=2", 1, "smoke-llama")
    out = f"--output={tmp_path / 'sum'}"
    refused(run("combine", f"--adapters={ours},{theirs}", "--weights=1,1", out), 4, "trained on base smoke-llama")
    refused(run("combine", f"--adapters={ours},nowhere", "--weights=1,1", out), 4, "nowhere is no adapter")
    refused(run("combine", "--adapters=", "--weights=", out), 2, "--adapters is empty")
    (tmp_path / "sum").mkdir()
    (tmp_path / "sum" / "notes").write_text("mine")
    refused(run("combine", f"--adapters={ours}", "--weights=1", out), 4, "holds something else")
