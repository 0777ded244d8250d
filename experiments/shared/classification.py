"""From a base, a method and sentences to a trained state: the pieces that `classify` and `peft_table` share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import training
from experiments.shared.training import Run
from research.convert.load import Pretrained
from research.data import text, tokenize
from research.data.batches import Batches, eval_batches
from research.errors import FlagError, ModelError
from research.models.bert import BertConfig
from research.nn.sites import EmbedNode
from research.peft import adapter, registry, tree
from research.peft import method as peft
from research.peft.method import PyTree, Sites, Variables
from research.peft.prefix import Prefix
from research.tasks import classify
from research.train import state as states
from research.train import step


@dataclass(frozen=True)
class Recipe(training.Recipe):
    """How to train, and the tokens that a row is cut to."""

    max_length: int = 48


class Data(NamedTuple):
    """Encoded parts: {"tokens", "mask" [N, T], "labels" [N]} each."""

    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    class_names: tuple[str, ...]
    fingerprint: str


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


def start(
    base: Pretrained,
    spec: str,
    classes: int,
    data: dict[str, np.ndarray],
    recipe: Recipe,
    seeds: int | Sequence[int],
    mesh: jax.sharding.Mesh | None = None,
) -> Run:
    """Attaches the method and a head; `check` comes first. `data`: the training part, for a method that fits to it."""

    def feed(seed: int) -> Callable[[int], dict[str, np.ndarray]]:
        rows = batches(data, replace(recipe, micro_batches=1), seed)
        return lambda i: {name: leaf[0] for name, leaf in rows(i).items()}

    heads = lambda rng: {"head": head(base, classes, rng)}  # noqa: E731
    return training.start(base, spec, classify.loss(base.model), recipe, seeds, heads=heads, feed=feed, mesh=mesh)


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


def classifier(
    directory: str, model: str | None = None, quantise: str | None = None, force: bool = False, **options: Any
) -> tuple[Pretrained, Variables, adapter.Adapter]:
    """The base that a classifier's adapter names (or `model`), the realised variables of both, and the adapter.

    Raises ModelError where the adapter is none of a classifier, or of another base (unless `force`).
    """
    loaded = adapter.load(directory)
    if loaded.meta.get("task") != "classify":
        raise ModelError(f"adapter {directory} is for task {loaded.meta.get('task')!r}, not 'classify'.")
    base = training.load_base(model or loaded.meta["base"]["name"], quantise, **options)
    sites = peft.sites(base.model)
    return base, peft.realised(loaded.method, attach(loaded, base, sites, force), sites), loaded


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


def batches(
    data: dict[str, np.ndarray], recipe: Recipe, seeds: int | Sequence[int]
) -> Callable[[int], dict[str, np.ndarray]]:
    """step -> batch."""
    return Batches(data, recipe.batch_size, seeds, recipe.micro_batches).batch


def predictions(
    base: Pretrained, run: Run, state: states.TrainState, data: dict[str, np.ndarray], batch_size: int = 64
) -> np.ndarray:
    """The class numbers of a part's N rows: [N], or [S, N] with seeds."""

    def predict(state: states.TrainState, frozen: Variables, batch: dict) -> jax.Array:
        variables = peft.realised(run.method, state.variables(frozen), run.sites)
        return jnp.argmax(classify.logits(base.model, variables, batch), axis=-1)

    several = state.step.ndim > 0
    labels = jax.jit(step.over_seeds(predict, shared_batch=True) if several else predict)
    found = [labels(state, run.frozen, batch) for batch in eval_batches(data, batch_size)]
    return np.concatenate(jax.device_get(found), axis=-1)[..., : len(data["labels"])]


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
