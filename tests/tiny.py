"""Models, batches and compiled functions that are small enough for every method on every model to share.

Base weights are drawn large (and biases and norms away from 0 and 1), so that an error anywhere shows in the output.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.models import stack
from research.models.bert import BertConfig
from research.models.gemma import GemmaConfig
from research.models.llama import LlamaConfig
from research.models.registry import build
from research.nn.on import On
from research.peft import method as peft
from research.peft import registry, tree
from research.tasks import classify, lm
from research.tasks.loss import model_variables
from research.train import state
from research.train.step import make_step

# B * T = 48 differs from every width, so that a product over tokens can be told from any other.
ROWS, LENGTH, SHORT, VOCAB, CLASSES = 4, 12, 8, 64, 3
ENCODER = BertConfig(VOCAB, 32, 2, 4, 56, max_positions=96, dropout=0.0, attention_dropout=0.0)
DECODER = LlamaConfig(VOCAB, 32, 2, 4, 2, 8, 56, max_positions=96)
# Three layers: a window, everything, a window.
GEMMA = GemmaConfig(
    VOCAB, 32, 3, 4, 2, 8, 56, 12.0, sliding_window=3, pattern=2, attention_softcap=2.0, final_softcap=3.0
)
CONFIGS = {"encoder": ENCODER, "decoder": DECODER}
MORE = {"gemma": GEMMA}  # for tests that ask for it


def fill(shapes: Any, seed: int = 0) -> Any:
    """Random parameters of the given shapes: kernels keep the variance of their input."""
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: Any) -> jax.Array:
        x = rng.normal(size=leaf.shape)
        name = path.rpartition("/")[2]
        x = {"kernel": x / np.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 1), "scale": 1 + 0.2 * x, "bias": 0.2 * x}.get(
            name, 0.7 * x
        )
        return jnp.asarray(x, leaf.dtype)

    return tree.map_with_path(draw, shapes)


@functools.cache
def params(config: Any) -> Any:
    """One base per configuration, the same numbers scanned and unrolled."""
    base = fill(peft.base(build(dataclasses.replace(config, scan=True, remat="none")))[0])
    return base if config.scan else stack.unstack(base)


@functools.cache
def batch(rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> dict[str, jax.Array]:
    """Padded on the right by different amounts; unequal weights, so that a mean of means would show."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(length // 2, length + 1, rows)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    tokens = rng.integers(1, VOCAB, (rows, length)).astype(np.int32) * mask
    labels, weight = rng.integers(0, CLASSES, rows), rng.integers(1, 4, rows)
    return {"tokens": tokens, "mask": mask, "labels": labels.astype(np.int32), "weight": weight.astype(np.float32)}


def micro(data: dict, count: int) -> dict:
    """[B, ...] -> [M, B / M, ...]."""
    return {k: v.reshape(count, -1, *v.shape[1:]) for k, v in data.items()}


def noise(values: Any, std: float = 0.1, seed: int = 1) -> Any:
    """Moves every float leaf; integers (a position shift) stay. In NumPy: jax would compile for each shape."""
    rng = np.random.default_rng(seed)

    def moved(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.asarray(np.asarray(x) + np.asarray(std * rng.normal(size=x.shape), x.dtype))

    return jax.tree.map(moved, values)


def tap() -> optax.GradientTransformation:
    """Keeps the gradients of the last step in the optimiser's state, where a test can read them."""
    return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, s, p=None: (g, g))


def optimizer() -> optax.GradientTransformation:
    """AdamW with a large weight decay, which moves whatever is not truly frozen."""
    return optax.chain(tap(), optax.adamw(1e-2, weight_decay=0.5))


class Case:
    """A method on a model. Everything compiled is built once, when first asked for."""

    def __init__(self, spec: str, family: str, **changes: Any):
        self.spec, self.family = spec, family
        self.config = dataclasses.replace((CONFIGS | MORE)[family], **changes)
        self.model, self.method = build(self.config), registry.parse(spec)
        self.sites = peft.sites(self.model)
        # The decoder learns to predict tokens, unless the method needs a head to have anything to train.
        self.has_head = family == "encoder" or "linear_probe" in spec
        self.plain_loss = (classify if self.has_head else lm).loss(self.model)
        self.loss = self.method.task(self.plain_loss) if self.method.task else self.plain_loss
        self.traces, stepper = 0, self.stepper()

        def counted(*args: Any) -> Any:
            self.traces += 1
            return stepper(*args)

        self.step = jax.jit(counted, donate_argnums=(0,))

    def stepper(self, tx: optax.GradientTransformation | None = None) -> Any:
        m = self.method
        realise = lambda v: peft.realised(m, v, self.sites)  # noqa: E731
        return make_step(
            self.loss,
            tx or optimizer(),
            realise=realise,
            penalty=m.penalty,
            update=m.update,
            rates=m.rates,
        )

    @functools.cached_property
    def variables(self) -> dict:
        """A fresh one."""
        added = jax.jit(lambda rng: peft.init(self.method, rng, self.sites))(jax.random.key(1))
        variables = {"params": params(self.config), "peft": added}
        if self.has_head:
            head = classify.init_head(jax.random.key(2), self.config.hidden_size, CLASSES)
            variables["head"] = jax.tree.map(lambda x: 20 * x + 0.1, head)
        if self.method.fit:
            realised = lambda v: peft.realised(self.method, v, self.sites)  # noqa: E731
            loss = lambda v, data, rng: self.plain_loss(realised(v), data, rng)  # noqa: E731
            variables = self.method.fit(jax.random.key(3), variables, loss, lambda i: batch(seed=i))
            assert tree.paths(variables["params"]) == tree.paths(params(self.config)), "fit leaves the base alone"
        return variables

    @functools.cached_property
    def mask(self) -> Any:
        return peft.mask(self.method, self.variables)

    def moved(self, seed: int = 1) -> dict:
        """Variables that differ from the fresh ones in all that trains, and in nothing else."""
        only = lambda new, old, m: jnp.asarray(np.where(m, new, old)) if tree.trains(m) else old  # noqa: E731
        return jax.tree.map(only, noise(self.variables, seed=seed), self.variables, self.mask)

    @functools.cached_property
    def point(self) -> dict:
        """A random point, for what trains and for what is added:

        zeros of the initialisation no longer hide anything.
        """
        trained = self.moved()
        frozen = tree.partition(noise(self.variables)["peft"], self.mask["peft"])[1]
        return trained | {"peft": tree.combine(frozen, trained["peft"])}

    def point_on(self, path: str) -> Any:
        """Whether a layer of an added leaf has a say: always, but for a node that is off there (and, with LoRA's B = 0
        in what did not train, for switching that one on).
        """
        nodes = tree.paths(self.point["peft"], is_leaf=peft.is_node)
        node = next(node for name, node in nodes.items() if path.startswith(f"{name}/"))
        return lambda layer: not isinstance(node, On) or layer in node.layers

    @functools.cached_property
    def _forward(self) -> Any:
        method = "__call__" if self.family == "encoder" else "logits"

        def forward(variables: dict, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            v = peft.realised(self.method, variables, self.sites)
            return self.model.apply(model_variables(v), tokens, mask, method=method)

        return jax.jit(forward)

    def forward(self, variables: dict, data: dict | None = None) -> np.ndarray:
        """The encoder's hidden states or the decoder's logits, [B, T, D or V]."""
        data = data or batch()
        return np.asarray(
            self._forward({k: v for k, v in variables.items() if k != "head"}, data["tokens"], data["mask"])
        )

    def start(self, variables: dict | None = None, tx: optax.GradientTransformation | None = None) -> tuple:
        """(state, frozen) at step 0."""
        trainable, extra, frozen = state.split(variables or self.variables, self.mask)
        return state.create(trainable, tx or optimizer(), jax.random.key(4), extra, self.mask), frozen

    def gradients(self, variables: dict, count: int = 1) -> tuple[Any, dict]:
        """The gradients of one step over `count` micro-batches, and its metrics.

        Without `update_norm`: Adam divides a gradient that is zero but for rounding (a key's bias moves no softmax) by
        itself, so the norm of its updates is not a function of the gradients to any tolerance.
        """
        start, frozen = self.start(variables)
        after, metrics = self.step(start, frozen, micro(batch(), count))
        return after.opt_state[0], {name: value for name, value in metrics.items() if name != "update_norm"}


@functools.lru_cache(maxsize=6)  # compiled programs are large: the tests of a case run one after the other
def case(spec: str, family: str, **changes: Any) -> Case:
    return Case(spec, family, **changes)


def close(a: Any, b: Any, atol: float = 1e-5) -> None:
    """Trees of the same structure, equal to `atol` (absolute, and relative above 1)."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=atol)


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, structure included."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype for x, y in pairs)


def alone(function: str) -> Any:
    """What "package.module:function" returns, as JSON, in a process of its own: with one device and XLA's optimisation,
    which the tests' own process does without.
    """
    module, name = function.split(":")
    program = f"import json; from {module} import {name}; print(json.dumps({name}()))"
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    where = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=where, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def equations(jaxpr: Any) -> list:
    """All equations of a program, those of its inner programs too."""
    out = []
    for eqn in jaxpr.eqns:
        out.append(eqn)
        for leaf in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(leaf, "eqns"):
                out += equations(getattr(leaf, "jaxpr", leaf))
    return out


def products(jaxpr: Any) -> list[tuple[tuple[int, ...], int]]:
    """(shape of the result, number of summed terms) of every matrix product."""
    out = []
    for eqn in equations(jaxpr):
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            out.append((eqn.outvars[0].aval.shape, int(np.prod([eqn.invars[0].aval.shape[i] for i in contract]))))
    return out
