"""Eight fake CPU devices, quick compilation and no hub, for every test."""

import os

import pytest

# Before jax starts its backend. The last two make compilation, most of the suite's time, several times quicker.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """What is compiled for a method on a model is compiled once: its tests, of whatever file, run on one worker."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        case = [params[name] for name in ("spec", "family") if name in params]
        group = "-".join(case) if len(case) == 2 else item.nodeid.split("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
