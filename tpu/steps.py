"""What is planned: by task a model, its loss and a batch, all of it shapes. A step is then made of them by the trainer.

lm      next tokens: pretraining and instruction tuning
grpo    a step that learns from a rollout of B rows; their sampling is another program
dit     denoising of latents with classes
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.diffusion import process
from research.errors import FlagError, did_you_mean
from research.models.dit import DitConfig
from research.models.registry import build, preset
from research.nn.kernels import attending
from research.peft import tree
from research.rl import rollout
from research.tasks import diffusion, lm, policy
from research.tasks.loss import Loss

GROUP = 8  # completions of a prompt


@dataclasses.dataclass(frozen=True)
class Job:
    """What is planned, but for the mesh. `batch` rows of `seq` tokens, or images, a step on all chips together.

    chunk: how many tokens' logits exist at a time, on all chips; 0 for all of them.
    """

    model: str
    peft: str
    topology: str
    batch: int
    seq: int
    task: str = "lm"
    remat: str = "full"
    attention: str = "xla"
    dtype: str = "bfloat16"
    base_dtype: str = "bfloat16"
    optimizer: str = "adamw"
    chunk: int = 0

    @property
    def units(self) -> tuple[int, str]:
        """How much a step learns from: tokens, or images."""
        return (self.batch, "images") if self.task == "dit" else (self.batch * self.seq, "tokens")


class Parts(NamedTuple):
    """`batch`: leaves [M, B / M, ...]; `state`: collections that the step carries beside what trains."""

    model: nn.Module
    loss: Callable[[dict, dict, jax.Array | None], Loss]
    batch: dict[str, jax.ShapeDtypeStruct]
    state: dict[str, Any]


def parts(job: Job, micro: int) -> Parts:
    """The pieces of the job's task. FlagError for an unknown task, and for a model that it is not for."""
    if job.task not in TASKS:
        raise FlagError(f"unknown task {job.task!r}.{did_you_mean(job.task, TASKS)}")
    config = preset(job.model)
    if isinstance(config, DitConfig) != (job.task == "dit") or not hasattr(config, "param_dtype"):
        valid = "dit-xl2, ..." if job.task == "dit" else "llama3-8b, ..."
        raise FlagError(f"task {job.task!r} is not for model {job.model!r}. Valid: {valid}")
    if job.task != "dit" and not hasattr(config, "tie_embeddings"):
        raise FlagError(f"model {job.model!r} is no decoder: task {job.task!r} predicts tokens. Valid: llama3-8b, ...")
    own = {"learn_sigma": False} if job.task == "dit" else {}  # as `experiments.diffusion` trains it
    config = attending(config, job.attention)
    config = dataclasses.replace(config, dtype=job.dtype, param_dtype=job.base_dtype, remat=job.remat, **own)
    model = build(config)
    shape = lambda dtype, *more: jax.ShapeDtypeStruct((micro, job.batch // micro, *more), dtype)  # noqa: E731
    return TASKS[job.task](job, model, shape)


def _lm(job: Job, model: nn.Module, shape: Callable) -> Parts:
    rows = shape(jnp.int32, job.seq)
    return Parts(model, lm.loss(model, job.chunk or None), {"tokens": rows, "mask": rows}, {})


def _grpo(job: Job, model: nn.Module, shape: Callable) -> Parts:
    variant = policy.variant("grpo")
    held = jax.eval_shape(lambda: rollout.empty(variant, job.batch, job.seq, GROUP))
    batch = {"rows": shape(jnp.int32), "weight": shape(jnp.float32), "first": shape(jnp.float32)}
    chunk = max(1, job.chunk // job.batch) if job.chunk else None  # here in positions
    return Parts(model, rollout.loss(model, variant, chunk=chunk), batch, {"rollout": held})


def _dit(job: Job, model: nn.Module, shape: Callable) -> Parts:
    c = model.config
    loss = diffusion.loss(model, process.flow(), "flow", classes=c.num_classes, times="logit_normal")
    images = shape(jnp.float32, c.image_size, c.image_size, c.channels)
    return Parts(model, loss, {"images": images, "labels": shape(jnp.int32)}, {})


TASKS = {"lm": _lm, "grpo": _grpo, "dit": _dit}


def analytic_flops(job: Job, params: Any) -> float:
    """The products of an lm step whose base is frozen, counted by hand.

    A kernel multiplies a token once forward and once for the gradient of its input, never for its own; with remat once
    more, but for what ends a layer (`mlp/down`) and for the head. Attention's two products are 4 T a channel and token,
    twice that for their gradients, and once again with remat.
    """
    kernels = {path: leaf.size for path, leaf in tree.paths(params).items() if path.endswith("kernel")}
    again = job.remat == "full"
    each = 0.0
    for path, size in kernels.items():
        inside = "layers" in path and "mlp/down" not in path
        each += 2 * size * (2 + (again and inside))
    c = preset(job.model)
    if getattr(c, "tie_embeddings", False):
        each += 4 * c.vocab_size * c.hidden_size
    each += c.num_layers * 4 * job.seq * c.num_heads * c.head_dim * (3 + again)
    return each * job.batch * job.seq
