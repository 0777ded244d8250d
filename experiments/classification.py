"""From a base, a method and sentences to a trained state: the pieces that `classify` and `peft_table` share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.convert.load import Pretrained, load
from research.data import text, tokenize
from research.data.batches import Batches, eval_batches
from research.errors import FlagError, ModelError
from research.models.bert import BertConfig
from research.nn.sites import EmbedNode
from research.peft import adapter, registry, tree
from research.peft import method as peft
from research.peft.method import Method, PyTree, Sites, Variables, fold
from research.peft.prefix import Prefix
from research.tasks import classify
from research.train import checkpoint, optimizer, step
from research.train import state as states


@dataclass(frozen=True)
class Recipe:
    """How to train. learning_rate is the peak; warmup is in steps, or a fraction of them when below 1."""

    learning_rate: float
    steps: int = 300
    batch_size: int = 32
    micro_batches: int = 1
    max_length: int = 48
    optimizer: str = "adamw"
    schedule: str = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def tx(self) -> optax.GradientTransformation:
        """The optimiser."""
        shape = {"schedule": self.schedule, "steps": self.steps, "warmup": self.warmup}
        return optimizer.make(self.optimizer, self.learning_rate, weight_decay=self.weight_decay, **shape)


class Data(NamedTuple):
    """Encoded parts: {"tokens", "mask" [N, T], "labels" [N]} each."""

    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    fingerprint: str


def load_base(name: str, **options: Any) -> Pretrained:
    """`load` for sentences. Raises ModelError for a model without a tokenizer."""
    base = load(name, **options)
    if base.tokenizer is None:
        raise ModelError(f"{name} comes without a tokenizer, so it can't read sentences: its directory needs one.")
    return base


def load_data(source: str, tokenizer: Any, max_length: int) -> Data:
    """Loads and encodes a labelled source; its notes are printed."""
    splits = text.load(source)
    parts = {}
    for name in ("train", "validation", "test"):
        examples = getattr(splits, name)
        parts[name] = tokenize.encode(tokenizer, examples.texts, max_length) | {"labels": examples.labels}
    for note in splits.notes:
        print(note)
    fingerprint = "-".join(getattr(splits, name).fingerprint for name in parts)
    return Data(**parts, class_names=splits.class_names, fingerprint=fingerprint)


class Run(NamedTuple):
    """A method on a base, ready to train. `state` has a leading seed axis where several seeds were given; `mask` is the
    first one's.
    """

    method: Method
    sites: Sites
    mask: Any
    state: states.TrainState
    frozen: Variables
    step: step.Step
    evaluate: Callable[..., dict[str, Any] | None]
    predict: Callable[..., jax.Array]


def start(
    base: Pretrained, spec: str, classes: int, data: dict[str, np.ndarray], recipe: Recipe, seeds: int | Sequence[int]
) -> Run:
    """Attaches the method and a head; `check` comes first. `data` is the training part, for a method that fits to it.

    A sequence of seeds makes one program of as many runs: own adapters, heads, optimiser states and data order, one
    base.
    """
    method = registry.parse(spec, tokenizer=base.tokenizer, run_steps=recipe.steps)
    sites = peft.sites(base.model)
    several, tx = not isinstance(seeds, int), recipe.tx()
    seeds = list(seeds) if several else [seeds]
    loss = classify.loss(base.model)

    @jax.jit
    def new(rng: jax.Array) -> Variables:
        return {"peft": peft.init(method, fold(rng, "peft"), sites), "head": head(base, classes, fold(rng, "head"))}

    def fitted(seed: int) -> Variables:
        rng = jax.random.key(seed)
        variables = {"params": base.params} | new(rng)
        if method.fit is None:
            return variables
        feed = batches(data, replace(recipe, micro_batches=1), seed)
        one = lambda i: {name: leaf[0] for name, leaf in feed(i).items()}  # noqa: E731
        fitted = method.fit(fold(rng, "fit"), variables, realising(method, sites, loss), one)
        return fitted | {"params": base.params}

    runs = [fitted(seed) for seed in seeds]
    masks = [peft.mask(method, run) for run in runs]
    mask, elements = states.split_masks(masks)

    @jax.jit
    def begin(params: Any, added: Variables, elements: Any, rng: jax.Array) -> states.TrainState:
        trainable, extra, _ = states.split({"params": params} | added, mask)
        return states.create(trainable, tx, fold(rng, "train"), extra, elements)

    added = [{k: v for k, v in run.items() if k != "params"} for run in runs]
    rngs = [jax.random.key(seed) for seed in seeds]
    if several:
        stacked = [jax.tree.map(lambda *xs: jnp.stack(xs), *trees) for trees in (added, elements, rngs)]
        state = jax.jit(jax.vmap(begin, in_axes=(None, 0, 0, 0)))(base.params, *stacked)
    else:
        state = begin(base.params, added[0], elements[0], rngs[0])
    frozen = states.split(runs[0], mask)[2]
    realise = None if method.realise is None else lambda v: method.realise(v, sites)
    hooks = {"realise": realise, "penalty": method.penalty, "update": method.update, "rates": method.rates}
    one = step.make_step(method.task(loss) if method.task else loss, tx, clip_norm=recipe.clip_norm, **hooks)

    def predict(state: states.TrainState, frozen: Variables, batch: dict) -> jax.Array:
        variables = peft.realised(method, state.variables(frozen), sites)
        return jnp.argmax(classify.logits(base.model, variables, batch), axis=-1)

    return Run(
        method,
        sites,
        masks[0],
        state,
        frozen,
        step.over_seeds(one) if several else one,
        step.make_eval(loss, realise=realise, seeds=several),
        jax.jit(step.over_seeds(predict, shared_batch=True) if several else predict),
    )


def realising(method: Method, sites: Sites, loss: step.LossFn) -> step.LossFn:
    """The loss of variables that are not realised yet."""
    return lambda variables, batch, rng: loss(peft.realised(method, variables, sites), batch, rng)


def head(base: Pretrained, classes: int, rng: jax.Array) -> dict[str, jax.Array]:
    """A fresh head: kernel [D, C], and for an encoder bias [C]."""
    return classify.init_head(rng, base.config.hidden_size, classes, bias=isinstance(base.config, BertConfig))


def head_shapes(base: Pretrained, classes: int) -> PyTree:
    """The shapes of `head`, for loading one."""
    return jax.eval_shape(lambda: head(base, classes, jax.random.key(0)))


def attach(loaded: adapter.Adapter, base: Pretrained, sites: Sites, force: bool = False) -> Variables:
    """The variables of base and adapter, with the head that a classifier must have."""
    shapes = head_shapes(base, len(loaded.meta["classes"])) if loaded.meta.get("task") == "classify" else None
    return adapter.attach(loaded, base.params, sites, base.fingerprint, force, shapes)


def check(base: Pretrained, spec: str) -> PyTree:
    """Whether a method can train on the model, from shapes alone. Returns the shapes of what the model would be
    applied with, for `check_length`. FlagError where it does not apply.
    """
    method, sites = registry.parse(spec), peft.sites(base.model)
    added = jax.eval_shape(lambda: peft.init(method, jax.random.key(0), sites))
    if method.fit is None:  # else it may choose what trains
        peft.mask(method, {"params": base.params, "peft": added, "head": head_shapes(base, 1)})
    realise = lambda x: peft.realised(method, {"params": base.params, "peft": x}, sites)["peft"]  # noqa: E731
    return jax.eval_shape(realise, added)


def check_length(base: Pretrained, added: PyTree, max_length: int) -> None:
    """FlagError where rows and virtual tokens together outgrow the model's positions. `added`: realised, or shapes."""
    nodes = tree.paths(added, is_leaf=peft.is_node).items()
    prompts = [jax.eval_shape(lambda n: n.tokens(), n) for _, n in nodes if isinstance(n, EmbedNode)]
    is_prefix = lambda x: isinstance(x, Prefix)  # noqa: E731
    inside = [(path, x) for path, node in nodes for x in jax.tree.leaves(node, is_leaf=is_prefix) if is_prefix(x)]
    prefixes = {path.rpartition("/")[2]: x.k.shape[-3] for path, x in inside}  # one shift for all layers
    virtual = sum(x.shape[0] for x in prompts if x is not None) + sum(prefixes.values())
    most = base.config.max_positions - getattr(base.config, "position_offset", 0) - virtual
    if max_length > most:
        raise FlagError(
            f"max_length={max_length} and {virtual} virtual tokens exceed {most + virtual} positions: "
            + (f"at most max_length={most}." if most > 0 else "fewer virtual tokens are needed.")
        )


def saved_identity(checkpoints: Path) -> dict[str, Any] | None:
    """The identity of the run whose checkpoints these are; None where there is none."""
    checkpointer = checkpoint.Checkpointer(checkpoints)
    newest = checkpointer.latest_step()
    return None if newest is None else checkpointer.meta(newest)["identity"]


def batches(
    data: dict[str, np.ndarray], recipe: Recipe, seeds: int | Sequence[int]
) -> Callable[[int], dict[str, np.ndarray]]:
    """step -> batch."""
    return Batches(data, recipe.batch_size, seeds, recipe.micro_batches).batch


def evaluator(run: Run, data: dict[str, np.ndarray], batch_size: int = 64) -> Callable[..., dict[str, Any] | None]:
    """(state, stop) -> means over all rows of a part."""
    return lambda state, stop=None: run.evaluate(state, run.frozen, eval_batches(data, batch_size), stop)


def predictions(run: Run, state: states.TrainState, data: dict[str, np.ndarray], batch_size: int = 64) -> np.ndarray:
    """The class numbers of a part's N rows: [N], or [S, N] with seeds."""
    found = [run.predict(state, run.frozen, batch) for batch in eval_batches(data, batch_size)]
    return np.concatenate(jax.device_get(found), axis=-1)[..., : len(data["labels"])]


def counts(run: Run) -> tuple[int, int]:
    """(trainable, total) of base and added subtree, heads apart; for one run of several."""
    several = run.state.step.ndim > 0
    variables = jax.eval_shape(lambda s: (states.take(s, 0) if several else s).variables(run.frozen), run.state)
    bare = {k: v for k, v in variables.items() if k != "head"}
    return tree.count(bare, {k: run.mask[k] for k in bare}), peft.parameters(bare)


def save_adapter(
    directory: Any,
    base: Pretrained,
    spec: str,
    run: Run,
    state: states.TrainState,
    data: Data,
    recipe: Recipe,
    **more: Any,
) -> int:
    """Saves what a single run has trained; returns its bytes."""
    return adapter.save(
        directory, spec, state.variables(run.frozen), run.sites, {"name": base.name, "fingerprint": base.fingerprint},
        task="classify", classes=list(data.class_names), max_length=recipe.max_length, **more,
    )  # fmt: skip
