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


class Reader:
    """A tensor in a file: remembers what was read."""

    shape, dtype = (16, 4), np.dtype("float32")

    def __init__(self):
        self.read = []

    def __getitem__(self, index):
        self.read.append(index[0].indices(16)[:2])
        return np.arange(64, dtype=np.float32).reshape(16, 4)[index]


def test_a_leaf_is_read_in_slices_and_never_whole():
    mesh, reader = meshes.make_mesh("fsdp:8"), Reader()
    places = meshes.shardings({"w": ("embed", None)}, {"w": reader}, mesh)
    placed = meshes.load({"w": reader}, places)["w"]
    assert sorted(set(reader.read)) == [(i, i + 2) for i in range(0, 16, 2)]
    np.testing.assert_array_equal(placed, np.arange(64).reshape(16, 4))


def test_parameters_are_made_in_their_shards():
    place = meshes.shardings(("embed",), jax.ShapeDtypeStruct((16,), jnp.float32), meshes.make_mesh("fsdp:8"))
    made = meshes.init(lambda n: n * jnp.ones(16), place, 3.0)
    assert made.sharding == place and made.addressable_shards[0].data.shape == (2,) and float(made[0]) == 3


@pytest.mark.parametrize("micro", [True, False])
def test_a_batch_is_placed_or_refused(micro):
    mesh = meshes.make_mesh("data:2,fsdp:4")
    place = meshes.batch_sharding(mesh, micro)
    rows = np.arange(32).reshape((2, 16) if micro else (32,))
    np.testing.assert_array_equal(meshes.place_batch({"x": rows}, place)["x"], rows)
    with pytest.raises(FlagError, match="a batch of 6 rows .* = 8. Valid: 8"):
        meshes.place_batch({"x": rows[:, :6] if micro else rows[:6]}, place)
