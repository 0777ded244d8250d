"""Eight fake CPU devices, quick compilation and no hub, for every test."""

import os
import re

from xdist.scheduler import LoadScopeScheduling

# Before jax starts its backend. The last two make compilation, most of the suite's time, several times quicker.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a test compiles what it tests
os.environ["MPLBACKEND"] = "Agg"


class _ByCase(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        case = re.search(r"\[(.*-(?:encoder|decoder))\]$", nodeid)
        return case.group(1) if case else nodeid.split("::")[0]


def pytest_xdist_make_scheduler(config, log):
    """What is compiled for a method on a model is compiled once: its tests, of whatever file, run on one worker. By the
    tests' names, since xdist 3.8 no longer sees its own groups under pytest 9.2.
    """
    return _ByCase(config, log)
