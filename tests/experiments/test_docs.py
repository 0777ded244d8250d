"""The commands that README and docs show: their flags exist, and the methods and models they name are there."""

import re
import shlex
from pathlib import Path

import jax.numpy as jnp
import pytest

from tests.experiments.script import run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(
    {line.strip() for page in PAGES for line in re.findall(r"python -m (experiments\.[^\n`#|<&]+)", page.read_text())}
)


def test_pages_show_commands():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_of_a_shown_command_exist(command: str):
    name, *arguments = shlex.split(command)
    outcome = run(name.removeprefix("experiments."), *arguments, "--only_check_args")
    assert outcome.status == 0, outcome.err


SPECS = sorted({s for c in COMMANDS for a in shlex.split(c) if (s := a.removeprefix("--peft=")) != a})


@pytest.mark.parametrize("spec", SPECS)
def test_a_shown_method_trains_something_of_some_model(spec: str):
    tried = [run("params", f"--model={model}", f"--peft={spec}") for model in ("bert-base", "smollm2-135m", "vit-b16")]
    assert any(outcome.status == 0 for outcome in tried), [outcome.err for outcome in tried]


@pytest.mark.slow
@pytest.mark.assets
def test_the_readmes_python_runs():
    block = re.search(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL).group(1)
    tokens = jnp.arange(6)[None]
    names = {"tokens": tokens, "mask": jnp.ones_like(tokens)}
    exec(block, names)
    assert names["tree"].count(names["trainable"]) == 2_442_240
