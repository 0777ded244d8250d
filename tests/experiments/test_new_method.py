"""docs/new_method.md: its method is what it says, by dotted path and in the package, and forty lines at most."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import research.peft
from research.errors import FlagError
from research.peft import adapter, registry
from research.peft import method as peft
from research.peft.merge import merge
from tests import tiny
from tests.experiments.script import run
from tests.peft import test_methods, test_training

GUIDE = (Path(__file__).parents[2] / "docs" / "new_method.md").read_text()
CODE = re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL).group(1)
SPEC = "my_package.road"


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The guide's file in a package on Python's path; gone afterwards."""
    folder = tmp_path_factory.mktemp("guide") / "my_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "road.py").write_text(CODE)
    sys.path.insert(0, str(folder.parent))
    importlib.invalidate_caches()
    yield folder
    sys.path.remove(str(folder.parent))
    for name in ("my_package", "my_package.road", "research.peft.road"):
        sys.modules.pop(name, None)


def test_it_is_forty_lines():
    lines = CODE.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120


def test_the_specifications_it_shows_are_read():
    specs = re.findall(r"--peft=(\S+?)`", GUIDE) + re.findall(r'registry\.parse\("(.*?)"\)', GUIDE)
    assert len(specs) >= 3 and all(spec.startswith(SPEC) for spec in specs)
    for spec in specs:
        assert isinstance(registry.parse(spec), peft.Method)


def test_the_command_line_counts_it():
    outcome = run("params", "--model=smollm2-135m", f"--peft={SPEC}")
    assert "trainable=23040 " in outcome.out and "23,040" in GUIDE


def test_it_turns_and_stretches_pairs():
    module = importlib.import_module(SPEC)
    rng = np.random.default_rng(0)
    angle, size, y = (rng.normal(size=shape).astype(np.float32) for shape in (3, 3, (5, 6)))
    turned = (y[:, ::2] + 1j * y[:, 1::2]) * size * np.exp(1j * angle)
    found = np.asarray(module.Road(angle, size).output(None, y, None))
    np.testing.assert_allclose(found[:, ::2] + 1j * found[:, 1::2], turned, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_a_fresh_one_is_the_base_and_a_trained_one_merges(family: str):
    case = tiny.case(SPEC, family)
    np.testing.assert_array_equal(case.forward(case.variables), test_methods.base_output(family))
    merged = merge(case.point)
    assert "peft" not in merged
    output = tiny.case("linear_probe", family).forward({"params": merged["params"]})
    np.testing.assert_allclose(output, case.forward(case.point), atol=2e-5)
    assert np.abs(output - test_methods.base_output(family)).max() > 1e-2


def test_training_lowers_the_loss():
    case = tiny.case(SPEC, "decoder")  # which has no head that could lower it alone
    state, frozen = case.start()
    losses = []
    for _ in range(10):
        state, metrics = case.step(state, frozen, tiny.micro(tiny.batch(), 1))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.98 * losses[0]


def test_it_saves_and_loads(tmp_path: Path):
    case = tiny.case(SPEC, "encoder")
    adapter.save(
        tmp_path / "road", SPEC, case.point, case.sites, {"name": "tiny", "fingerprint": "f" * 64}, classes=["a"]
    )
    loaded = adapter.attach(adapter.load(tmp_path / "road"), case.variables["params"], case.sites, "f" * 64)
    np.testing.assert_array_equal(case.forward(loaded), case.forward(case.point))


def test_an_odd_width_is_refused():
    sites = {"layers/attn/q": peft.Site("linear", (4, 3), (None, None), jax.ShapeDtypeStruct((), "float32"))}
    with pytest.raises(FlagError, match=r"targets=attn/q: .*\[4, 3\] has an odd width"):
        peft.init(registry.parse(f"{SPEC}:targets=attn/q"), jax.random.key(0), sites)


def test_in_the_package_it_is_a_method_like_any_other(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(research.peft, "__path__", [*research.peft.__path__, str(package)])
    importlib.invalidate_caches()
    assert "road" in registry.names() and registry.card("road").paper == "2409.00119"
    assert "| `road` | [2409.00119](" in run("params", "--methods").out
    test_methods.test_every_layer_of_every_added_leaf_changes_the_output("road", "encoder")
    test_methods.test_padding_and_neighbours_change_nothing("road", "encoder")
    test_methods.test_save_and_load_under_any_name("road", "encoder", tmp_path)
    test_training.test_only_what_trains_moves("road", "encoder")
    test_training.test_every_trained_leaf_has_a_gradient_within_two_steps("road", "encoder")
