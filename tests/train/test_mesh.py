import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from research.errors import FlagError
from research.train import mesh as meshes
from research.train import optimizer, state, step
from research.train.checkpoint import Checkpointer
from tests.train import toy

AXES = {
    "params": {"w": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}},
    "peft": {"w": {"a": ("embed", "rank"), "b": ("rank", "mlp"), "scale": None}},
    "head": {"h": {"kernel": ("embed", None), "bias": (None,)}},
}


def test_spec_becomes_a_mesh():
    assert dict(meshes.make_mesh("fsdp:4,data:2").shape) == {"data": 2, "fsdp": 4, "tensor": 1, "sequence": 1}
    assert meshes.make_mesh().shape["data"] == 8
    assert dict(meshes.make_mesh("tensor=2", jax.devices()[:2]).shape)["tensor"] == 2


@pytest.mark.parametrize(
    "spec, text",
    [
        ("data:2,fdsp:4", "Did you mean 'fsdp'"),
        ("data:3", "3 places for 8 devices. Valid: data:1,fsdp:8, data:2,fsdp:4"),
        ("data:16", "16 places for 8 devices"),
        ("data:2,data:4", "given twice"),
        ("data", "needs a size"),
        ("data:-2", "needs a size"),
        ("data:0", "needs a size"),
    ],
)
def test_bad_specs_name_valid_ones(spec, text):
    with pytest.raises(FlagError) as error:
        meshes.make_mesh(spec)
    assert text in str(error.value)


def test_rules_and_fallbacks():
    mesh = meshes.make_mesh("data:2,fsdp:2,tensor:2")
    spec = lambda axes, shape: meshes.partition_spec(axes, shape, mesh)  # noqa: E731
    assert spec(("layers", "embed", "heads"), (6, 8, 8)) == P(None, "fsdp", "tensor")
    assert spec(("batch", "length", None), (8, 4, 4)) == P(("data", "fsdp"), None, None)
    assert spec(("embed", "heads"), (7, 8)) == P(None, "tensor")  # 7 is not divided by 2
    assert spec(("heads", "mlp"), (8, 8)) == P("tensor", None)  # an axis is used once
    with pytest.raises(ValueError, match="Did you mean 'embed'"):
        spec(("embd",), (8,))
    with pytest.raises(ValueError, match="shape"):
        spec(("embed",), (8, 8))


def test_shard_copies_so_that_donation_cannot_reach_the_source():
    mesh = meshes.make_mesh("data:8")
    source = {"w": jnp.arange(8.0), "hole": None}
    placed = meshes.shard(source, meshes.shardings({"w": None, "hole": ("embed",)}, source, mesh))
    jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=(0,))(placed)
    assert placed["w"].is_deleted() and not source["w"].is_deleted()
    np.testing.assert_array_equal(source["w"], np.arange(8.0))


@pytest.mark.parametrize("spec", ["data:8", "fsdp:8", "data:2,fsdp:2,tensor:2"])
def test_eight_devices_equal_one(spec, tmp_path):
    mesh, tx = meshes.make_mesh(spec), optimizer.make("adamw", 1e-2, weight_decay=0.1)
    one, want = toy.run(toy.setup(tx=tx), 10, micro=2)
    s, frozen, stepper = toy.setup(tx=tx)
    places = meshes.state_shardings(AXES, s, mesh)
    base = meshes.shardings(AXES, frozen, mesh)
    s, frozen, rows = meshes.shard(s, places), meshes.shard(frozen, base), meshes.batch_sharding(mesh)
    with meshes.use(mesh):
        compiled = step.compile(stepper, s, frozen, toy.batch(0, micro=2), (places, base, rows))
        for k in range(10):
            s, metrics = compiled(s, frozen, toy.batch(k, micro=2))
    np.testing.assert_allclose(metrics["loss"], want["loss"], rtol=1e-5)
    Checkpointer(tmp_path).save(10, s, {})
    again, _ = Checkpointer(tmp_path).restore(10, s)
    assert toy.same(again, s) and all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, again, s)))
    compiled(again, frozen, toy.batch(10, micro=2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), s.trainable, one.trainable)
    if "fsdp:8" in spec:
        a = s.trainable["peft"]["w"]["a"]
        moments = [x for x in jax.tree.leaves(s.opt_state) if x.shape == a.shape and x.sharding == a.sharding]
        assert a.addressable_shards[0].data.nbytes == a.nbytes // 8 and len(moments) >= 2
        assert frozen["params"]["w"]["kernel"].addressable_shards[0].data.nbytes == 4 * toy.D


def test_state_shardings_cover_factored_and_stacked_states():
    mesh = meshes.make_mesh("fsdp:8")
    trainable, extra, _ = state.split(toy.variables(), toy.MASK)
    for name in optimizer.DEFAULTS:
        s = state.create(trainable, optimizer.make(name, 1e-2), jax.random.key(0), extra)
        places = meshes.state_shardings(AXES, s, mesh)
        assert jax.tree.structure(places) == jax.tree.structure(s)
        assert toy.same(meshes.shard(s, places), s)
