"""A model small enough to train in milliseconds: y = tanh(x (W + s a b)) h, weighted squares."""

import jax
import jax.numpy as jnp
import numpy as np

from research.tasks.loss import Loss
from research.train import loop, metrics, optimizer, state, step
from research.train import mesh as meshes
from research.train.checkpoint import Checkpointer

D, R = 8, 2
MASK = {
    "params": {"w": {"kernel": False, "bias": False}},
    "peft": {"w": {"a": True, "b": True, "scale": False}},
    "head": {"h": {"kernel": True, "bias": True}},
}
AXES = {
    "params": {"w": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}},
    "peft": {"w": {"a": ("embed", "rank"), "b": ("rank", "mlp"), "scale": ()}},
    "head": {"h": {"kernel": ("embed", None), "bias": (None,)}},
}


def variables(seed: int = 0) -> dict:
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    rng = np.random.default_rng(seed)
    return {
        "params": {"w": {"kernel": normal(D, D) / 3, "bias": jnp.zeros(D)}},
        "peft": {"w": {"a": normal(D, R), "b": normal(R, D) / 9, "scale": jnp.asarray(0.5)}},
        "head": {"h": {"kernel": normal(D, 1) / 3, "bias": jnp.zeros(1)}},
    }


def loss(v: dict, batch: dict, rng: jax.Array | None) -> Loss:
    w, p, h = v["params"]["w"], v["peft"]["w"], v["head"]["h"]
    x = batch["x"]
    if rng is not None and "drop" in batch:
        x = x * jax.random.bernoulli(rng, 0.8, x.shape)
    y = jnp.tanh(x @ (w["kernel"] + p["scale"] * p["a"] @ p["b"]) + w["bias"]) @ h["kernel"] + h["bias"]
    error = (y[:, 0] - batch["y"]) ** 2 * batch["weight"]
    near = (error < 0.5) * batch["weight"]
    weight = batch["weight"].sum()
    return Loss(error.sum(), weight, {"near": (near.sum(), weight)})


def batch(step: int, micro: int = 1, rows: int = 16, seed: int = 0, drop: bool = False) -> dict:
    """A pure function of the step; rows weigh unequally, so that averaging averages would show."""
    rng = np.random.default_rng((seed, step))
    x = rng.normal(size=(rows, D)).astype(np.float32)
    out = {"x": x, "y": np.sin(x.sum(1)).astype(np.float32), "weight": rng.integers(0, 5, rows).astype(np.float32)}
    if drop:
        out["drop"] = np.ones(rows, np.float32)
    return {k: v.reshape(micro, rows // micro, *v.shape[1:]) for k, v in out.items()}


def rows(step: int) -> dict:
    """The same without the axis of micro-batches, for evaluation."""
    return {k: v[0] for k, v in batch(step).items()}


def setup(seed: int = 0, tx=None, mask=None, **options):
    """Returns (state, frozen, step)."""
    tx = tx or optimizer.make("adamw", 1e-2, weight_decay=0.1)
    trainable, extra, frozen = state.split(variables(seed), mask or MASK)
    stepper = step.make_step(options.pop("loss", loss), tx, **options)
    return state.create(trainable, tx, jax.random.key(seed), extra, mask), frozen, stepper


def run(setup, steps: int = 3, **options):
    """Returns the state and the metrics after some steps."""
    s, frozen, stepper = setup
    stepper = jax.jit(stepper, donate_argnums=(0,))
    for k in range(steps):
        s, metrics = stepper(s, frozen, batch(k, **options))
    return s, metrics


def fit(folder, mesh, steps: int, **options) -> loop.Result:
    """Trains on a mesh, of several processes too, or goes on in `folder`."""
    s, frozen, stepper = setup()
    rows = meshes.batch_sharding(mesh)

    def mine(k: int) -> dict:
        return meshes.place_batch(batch(k), rows)

    with meshes.use(mesh):
        s = meshes.load(s, meshes.state_shardings(AXES, s, mesh))
        frozen = meshes.load(frozen, meshes.shardings(AXES, frozen, mesh))
        keep = {"checkpointer": Checkpointer(folder / "c"), "writer": metrics.Writer(folder / "m.jsonl")}
        return loop.fit(jax.jit(stepper, donate_argnums=(0,)), s, frozen, mine, steps=steps, **keep, **options)


def same(a, b) -> bool:
    """Bit for bit."""
    plain = lambda x: (  # noqa: E731
        np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
    )
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(plain(x).tobytes() == plain(y).tobytes() for x, y in zip(a, b, strict=True))
