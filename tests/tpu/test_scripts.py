import subprocess
import sys
from pathlib import Path

import pytest

TPU = Path(__file__).parents[2] / "tpu"
COMMAND = ("--", "python", "-m", "x", "--a=b c")


def call(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([TPU / script, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("script", "more", "text"),
    [
        ("create.sh", ("--type=v5p-16", "--spot"), "--accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 --spot"),
        ("create.sh", ("--direct",), "tpu-vm create r1 --zone=z"),
        ("setup.sh", (), "tpu-vm scp"),
        ("run.sh", COMMAND, "--worker=all"),
        ("logs.sh", (), "peftree.log"),
        ("keep_alive.sh", COMMAND, "queued-resources delete r1 --zone=z --force --quiet"),
        ("delete.sh", (), "queued-resources delete r1 --zone=z --force --quiet"),
        ("slurm.sh", COMMAND, "srun\\ --kill-on-bad-exit=1\\ python\\ -m\\ x"),
    ],
)
def test_a_dry_run_prints_and_does_nothing(script, more, text):
    done = call(script, "--name=r1", "--zone=z", "--dry_run", *more)
    assert done.returncode == 0 and text in done.stdout and not done.stderr


@pytest.mark.parametrize("script", ["create.sh", "setup.sh", "logs.sh", "delete.sh"])
def test_an_unknown_argument_is_one_line(script):
    done = call(script, "--nmae=r1", "--dry_run")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "unknown argument --nmae=r1. Valid: --name=" in done.stderr


def test_shellcheck_passes():
    scripts = [*TPU.glob("*.sh"), TPU.parent / ".ci" / "run"]
    command = [Path(sys.prefix) / "bin" / "shellcheck", "-x", *scripts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=TPU.parent)
    assert done.returncode == 0, done.stdout
