import jax
import jax.numpy as jnp
import pytest

from research.errors import FlagError
from research.train.count import Collective, collectives, matmul_flops
from tpu import chips

HLO = """HloModule m
%body (p: (f32[8])) -> (f32[8]) {
  %x = f32[1024]{0} parameter(0)
  %all-gather.1 = f32[4096]{0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}
}
%cond (p: (f32[8])) -> pred[] {
  %p = pred[] parameter(0)
}
ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[512]{0} parameter(0)
  %w = (f32[8]) while(%a), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"30"}}
  %r = f32[512]{0} all-reduce(%a), replica_groups={{0,1},{2,3}}, to_apply=%cond
}
"""


def test_a_collective_in_a_loop_counts_as_often_as_it_runs():
    found = collectives(HLO)
    assert found == {"all-gather": Collective(30, 30 * 4096 * 3), "all-reduce": Collective(1, 2048)}


def test_products_in_a_scan_count_as_often_as_it_runs():
    def f(w, x):
        return jax.lax.scan(lambda h, k: (h @ k, None), x, w)[0]

    w, x = jnp.ones((5, 8, 8)), jnp.ones((3, 8))
    assert matmul_flops(jax.make_jaxpr(f)(w, x).jaxpr) == 5 * 2 * 3 * 8 * 8


@pytest.mark.parametrize(("name", "text"), [("v5f:4x4", "Did you mean"), ("v5e", "has no shape")])
def test_a_topology_without_a_chip_is_refused(name, text):
    with pytest.raises(FlagError, match=text):
        chips.chip(name)


def test_a_loop_without_a_note_runs_to_its_condition_and_parts_of_one_channel_count_once():
    text = HLO.replace(', backend_config={"known_trip_count":{"n":"30"}}', "")
    text = text.replace("  %p = pred[] parameter(0)", "  %n = s32[]{:T(128)} constant(7)")
    gather = next(line for line in text.splitlines() if "all-gather" in line)
    mesh = gather.replace("[1,4]<=[4]", "mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, channel_id=3")
    again = mesh.replace("gather.1", "gather.2")
    found = collectives(text.replace(gather, f"{mesh}\n{again}"))
    assert found["all-gather"] == Collective(7, 7 * 4096 * 3)
