"""What a chip can do, by the name that libtpu's topologies have, and the topologies that exist.

Figures are those of the makers' public tables, per chip: HBM in bytes, bfloat16 FLOP/s, HBM bytes/s, and bytes/s of all
inter-chip links together. No collective reaches the last one on a mesh axis that uses only some of the links, so the
time computed from it is a lower bound.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import jax

from research.errors import FlagError, did_you_mean

GIB = 2**30
# One that compiles takes no chip from another, and does not complain that its host has none.
ALONE = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
         "TPU_ACCELERATOR_TYPE": "v5litepod-4"}  # fmt: skip


class Chip(NamedTuple):
    hbm: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    topologies: tuple[str, ...]


CHIPS = {
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
    "v5p": Chip(
        95 * GIB,
        459e12,
        2765e9,
        600e9,
        ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    ),
    "v6e": Chip(32 * GIB, 918e12, 1640e9, 448e9, ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")),
}


def chip(topology: str) -> Chip:
    """The chip of "v5e:4x4". FlagError names the chips that there are."""
    name, colon, _ = topology.partition(":")
    if name not in CHIPS:
        raise FlagError(f"topology {topology!r}: unknown chip {name!r}.{did_you_mean(name, CHIPS)}")
    if not colon:
        raise FlagError(f"topology {topology!r} has no shape, as in {name}:{CHIPS[name].topologies[0]}")
    return CHIPS[name]


def compile_only() -> None:
    """For a process that runs nothing: it looks for no chip, and keeps no programs, which it could not read again."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)


def devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a slice that nobody has: what libtpu compiles for. FlagError where libtpu rejects it or is not
    installed.
    """
    valid = chip(topology).topologies
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # jax has no narrower one for all that libtpu says
        reason = str(error).strip().splitlines()[0]
        if "INVALID_ARGUMENT" not in reason:
            raise FlagError(
                f"libtpu can't be asked for {topology!r}: {reason}. Install it: pip install -e '.[tpu]'"
            ) from None
        name = topology.partition(":")[0]
        raise FlagError(f"topology {topology!r}: {reason}. Valid: {', '.join(f'{name}:{t}' for t in valid)}.") from None
