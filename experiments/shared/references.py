"""The reference policy of a run: frozen collections that lie over the policy's own, so that nothing is held twice.

    base               {"params": first values of the base leaves that train, holes elsewhere}: none at all for LoRA
    initial_adapter    the same, and {"peft": ...} as the run starts with it

A hole means the policy's own buffer. The collection is frozen: it is no part of the state, never saved, and made again
from the seed, or the adapter, when a run is resumed.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import training
from research.convert.load import Pretrained
from research.data.batches import Batches
from research.errors import ModelError
from research.peft import adapter as adapters
from research.peft import method as peft
from research.peft import registry, tree
from research.train import mesh as meshes
from research.train import state as states
from research.train.step import LossFn


def holes(x: Any) -> Any:
    return jax.tree.map(lambda _: None, x)


def referred(variables: dict) -> dict:
    """The reference's collections: what was kept of them, and for the rest the policy's own buffers."""
    own = {name: variables[name] for name in variables["reference"]}  # where nothing was: a method may be fitting yet
    kept = {name: part for name, part in variables["reference"].items() if jax.tree.leaves(part)}
    return own | {name: tree.combine(part, own[name]) for name, part in kept.items()}


def start(
    base: Pretrained,
    spec: str,
    loss: LossFn,
    recipe: training.Recipe,
    seed: int,
    data: dict[str, np.ndarray],
    *,
    reference: str | None,
    loaded: adapters.Adapter | None = None,
    force: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> training.Run:
    """Attaches the method, fresh or as `loaded`, and the reference, which is frozen and lies beside the base.

    Raises ModelError where an adapter can't be trained on.
    """
    method, sites = registry.parse(spec), peft.sites(base.model)

    def shapes() -> dict:
        fresh = {"params": base.params, "peft": peft.init(method, jax.random.key(0), sites)}
        return {k: v for k, v in peft.realised(method, fresh, sites).items() if k != "params"}

    empty = {"params": holes(base.params)}
    empty |= holes(jax.eval_shape(shapes)) if reference == "initial_adapter" else {}
    heads = None if reference is None else lambda _: {"reference": empty}

    def feed(seed: int) -> training.Batch:
        rows = Batches(data, recipe.batch_size, seed).batch
        return lambda i: {name: leaf[0] for name, leaf in rows(i).items()}

    run = training.start(base, spec, loss, recipe, seed, heads=heads, feed=feed, mesh=mesh)
    if loaded is not None:
        run = adopt(run, base, adapters.attach(loaded, base.params, sites, base.fingerprint, force), recipe, mesh)
    if reference is None:
        return run
    first = run.state.variables(run.frozen)
    if reference == "base":
        kept = {"params": tree.partition(base.params, run.mask["params"])[0]}
    else:
        now = peft.realised(run.method, first, sites)
        kept = {name: now[name] for name in empty} | {"params": tree.partition(now["params"], run.mask["params"])[0]}
        kept = jax.tree.map(jnp.copy, kept)  # the step donates what trains
    axes = run.axes | {"reference": {name: run.axes.get(name, holes(x)) for name, x in kept.items()}}
    if mesh is not None:
        kept = meshes.load(kept, meshes.shardings(axes["reference"], kept, mesh))
    return run._replace(frozen=run.frozen | {"reference": kept}, axes=axes)


def adopt(run: training.Run, base: Pretrained, variables: dict, recipe: training.Recipe, mesh: Any) -> training.Run:
    """The run with an adapter's numbers instead of fresh ones."""
    fresh = run.state.variables(run.frozen)
    variables = {name: variables.get(name, fresh[name]) for name in fresh}
    if run.state.mask is not None or jax.tree.structure(variables) != jax.tree.structure(fresh):
        raise ModelError(
            "this adapter can't be trained on: what is saved of its method is not all that trained. "
            "Merge it into the base (experiments.merge) and name that as --model."
        )
    trainable, extra, _ = states.split(variables, run.mask)
    state = jax.jit(lambda t, e, rng: states.create(t, recipe.tx(), rng, e))(trainable, extra, run.state.rng)
    if mesh is not None:
        state = meshes.load(state, meshes.state_shardings(run.axes, state, mesh))
    return run._replace(state=state)


def live_bases(run: training.Run, base: Pretrained, kept: Any = None) -> float:
    """The bytes of the base that a run holds, frozen, training and in its reference, each buffer once, over the base's
    own. kept: the reference's "params"; by default those of the run's frozen collection.
    """
    kept = run.frozen.get("reference", {}).get("params") if kept is None else kept
    found = {}
    for leaf in jax.tree.leaves((run.frozen["params"], run.state.trainable["params"], kept)):
        found[tuple(shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards)] = leaf.nbytes
    return sum(found.values()) / sum(leaf.nbytes for leaf in jax.tree.leaves(base.params))
