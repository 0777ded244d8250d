"""A training script in two processes of two devices each is the same script on four devices of one."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.experiments.test_sft import write_talks
from tests.train.test_distributed import finish

ROOT = Path(__file__).parents[2]
CLASSIFY = ["classify", "--model=smoke", "--data=smoke", "--steps=12", "--batch_size=8", "--max_length=16"]
CLASSIFY += ["--peft=lora:rank=2+prefix:length=2,hidden=4", "--eval_every=6", "--save_every=6", "--keep=5"]
SFT = ["sft", "--model=smoke-llama", "--template=plain", "--steps=6", "--batch_size=8", "--max_length=32"]
SFT += ["--max_new=4", "--samples=1", "--eval_every=3", "--save_every=3"]
GLOO = r"\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\b\d+\b"


def script(arguments: list[str], workdir: Path, count: int, mesh: str = "data:2,fsdp:2") -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each of `count` processes, which have four devices together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={4 // count} --xla_backend_optimization_level=0"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", f"experiments.{arguments[0]}", *arguments[1:], f"--workdir={workdir}"]
    command += [f"--mesh={mesh}"] if mesh else []
    places = [[f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process_id={i}"] for i in range(count)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command + place, cwd=ROOT, env=env, **pipes) for place in places]
    return finish(processes, timeout=180)


def same(one: Path, other: Path) -> None:
    rows = [[json.loads(line) for line in (d / "metrics.jsonl").open()] for d in (one, other)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=1e-5, atol=1e-5, err_msg=str(a))
    leaves = [load_file(d / "adapter" / "adapter.safetensors") for d in (one, other)]
    assert leaves[0].keys() == leaves[1].keys()
    for name, leaf in leaves[0].items():
        np.testing.assert_allclose(leaves[1][name], leaf, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("alone") / "run"
    ((status, _, err),) = script(CLASSIFY, workdir, 1)
    assert status == 0, err
    return workdir


@pytest.mark.slow
def test_two_processes_end_where_one_does_and_the_first_alone_speaks(alone: Path, tmp_path: Path):
    first, second = script(CLASSIFY, tmp_path, 2)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "test accuracy" in first[1] and "step 12/12" in first[2]
    # Gloo's threads write a line in pieces, so that pieces of two lines can stand in any order and on any line.
    said = re.sub(GLOO, "", second[1] + second[2])
    assert not [line for line in said.splitlines() if line.strip() and "JAX" not in line]
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in alone.iterdir()}
    same(alone, tmp_path)


@pytest.mark.slow
def test_two_processes_go_on_where_one_was(alone: Path, tmp_path: Path):
    shutil.copytree(alone, tmp_path / "run")
    for later in ("checkpoints/12", "adapter"):
        shutil.rmtree(tmp_path / "run" / later)
    first, second = script(CLASSIFY, tmp_path / "run", 2, mesh="")  # one axis over all devices
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "going on from step 6" in first[2]
    same(alone, tmp_path / "run")


@pytest.mark.slow
def test_a_language_model_is_tuned_evaluated_and_asked_by_two_processes(tmp_path: Path):
    arguments = [*SFT, f"--data={write_talks(tmp_path / 'talks.jsonl')}"]
    ended = script(arguments, tmp_path / "one", 1) + script(arguments, tmp_path / "two", 2)
    assert [status for status, _, _ in ended] == [0, 0, 0], ended
    same(tmp_path / "one", tmp_path / "two")
    results = [json.loads((tmp_path / d / "result.json").read_text()) for d in ("one", "two")]
    assert results[0]["samples"] == results[1]["samples"]


@pytest.mark.slow
def test_what_runs_in_one_process_says_so(tmp_path: Path):
    ended = script(["grpo", "--task=sort"], tmp_path / "run", 2)
    assert [status for status, _, _ in ended] == [2, 2]
    for _, _, err in ended:
        assert err.strip().splitlines()[-1].startswith("error: process") and "Valid with --processes" in err
    assert not (tmp_path / "run").exists()
