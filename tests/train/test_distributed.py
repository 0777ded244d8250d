import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from research.errors import FlagError
from research.train import distributed
from research.train import mesh as meshes
from research.train.checkpoint import Checkpointer
from research.train.distributed import Place, find, first_host
from tests import tiny
from tests.train import toy, workers

SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "4097", "SLURM_JOB_NODELIST": "gpu[003-006],x1"}


def test_a_process_finds_its_place():
    assert find(environ={}) is None
    assert find(environ={"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert find(environ={"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}) == Place()
    assert find(environ=SLURM) == Place("gpu003:61441", 4, 3)
    assert find(environ=SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find("10.0.0.2:8476", 2, 1, SLURM) == Place("10.0.0.2:8476", 2, 1)


@pytest.mark.parametrize(
    ("nodes", "host"), [("a1", "a1"), ("a1,b2", "a1"), ("gpu[003-007,9],x", "gpu003"), ("n[1,3]-ib", "n1-ib")]
)
def test_the_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (("10.0.0.2:1", 2, None), "process_id is missing"),
        (("10.0.0.2", 2, 0), "is no address"),
        (("10.0.0.2:1", 2, 2), "valid are 0 to 1"),
    ],
)
def test_bad_places_are_refused(given, text):
    with pytest.raises(FlagError, match=text):
        find(*given, environ={})


def test_alone_nothing_is_started():
    with distributed.run(find(environ={})) as writes:
        assert writes and distributed.is_main()


def start(*what: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.train.workers", str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    where, flags = Path(__file__).parents[2], "--xla_force_host_platform_device_count=2"
    flags += " --xla_backend_optimization_level=0"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return [subprocess.Popen([*command, str(i), *what], cwd=where, env=env, **pipes) for i in range(2)]


def finish(processes: list[subprocess.Popen], timeout: int = 120) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each."""
    try:
        texts = [p.communicate(timeout=timeout) for p in processes]
        return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]
    finally:
        for p in processes:
            p.kill()


@pytest.mark.slow
def test_two_processes_of_two_devices_equal_one_device():
    ended = finish(start("train"))
    assert [code for code, _, _ in ended] == [0, 0], ended
    losses = [np.array(out.splitlines()[-1].split(), float) for _, out, _ in ended]
    one = workers.train(tiny.case("lora", "decoder"), meshes.make_mesh("data:1", jax.devices()[:1]))
    assert one[0] != one[-1]
    for ours in losses:
        np.testing.assert_allclose(ours, one, atol=1e-5)


@pytest.mark.slow
def test_a_failed_process_ends_the_other_with_its_reason():
    began = time.monotonic()
    ended = finish(start("fail"))
    assert time.monotonic() - began < 60
    for code, _, err in ended:
        assert code == 1 and "process 1 failed: the disk is full" in err


@pytest.mark.slow
def test_a_killed_process_ends_the_other_within_the_heartbeat():
    began = time.monotonic()
    ended = finish(start("kill"))
    assert time.monotonic() - began < 90
    (code, _, err), (killed, _, _) = ended
    assert killed == -9 and code not in (0, None)
    assert "unhealthy (stopped sending heartbeats):\n1\n" in err  # jax's own words name process 1


@pytest.mark.slow
def test_saved_on_8_devices_a_run_goes_on_in_2_processes_until_one_is_told_to_stop_and_then_on_1_device(tmp_path):
    toy.fit(tmp_path / "part", meshes.make_mesh("data:2,fsdp:4", jax.devices()[:8]), 3)
    ended = finish(start("fit", str(tmp_path / "part")))
    assert [code for code, _, _ in ended] == [143, 143], ended
    stopped = Checkpointer(tmp_path / "part" / "c").latest_step()
    assert 8 <= stopped <= 7 + distributed.AHEAD + 2
    one = meshes.make_mesh("data:1", jax.devices()[:1])
    results = [toy.fit(tmp_path / name, one, stopped + 3) for name in ("part", "whole")]
    losses = [[r["loss"] for r in result.history] for result in results]
    assert len(losses[0]) == stopped + 3 and losses[0][0] != losses[0][-1]
    np.testing.assert_allclose(*losses, rtol=1e-5)
