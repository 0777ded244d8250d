"""Policies that read characters, small enough to be trained from nothing, and tasks whose answers can be checked.

arithmetic   "37+58=" -> "95"         sort   "dbca=" -> "abcd"
"""

from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import common, training
from research.convert.fingerprint import fingerprint
from research.convert.load import Pretrained
from research.data.batches import Batches
from research.errors import FlagError, did_you_mean
from research.models.llama import LlamaConfig
from research.models.registry import build
from research.rl.rewards import RewardFn
from research.tasks import lm

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def tokenizer(alphabet: str) -> Any:
    """A fast tokenizer of single characters: <pad> 0, <eos> 1, <unk> 2, then the alphabet. It adds nothing itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([PAD, EOS, UNKNOWN, *alphabet])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN)


def policy(name: str, alphabet: str, length: int, width: int = 64, layers: int = 2, seed: int = 0) -> Pretrained:
    """A decoder with fresh weights, for rows of at most `length` characters."""
    reads = tokenizer(alphabet)
    heads = max(1, width // 16)
    config = LlamaConfig(len(reads), width, layers, heads, heads, width // heads, 4 * width, max_positions=length)
    model = build(config)
    init = jax.jit(lambda rng: nn.unbox(model.init(rng, jnp.zeros((1, 2), jnp.int32))["params"]))
    return renamed(Pretrained(name, config, model, init(jax.random.key(seed)), reads, ""))


def renamed(base: Pretrained, **changes: Any) -> Pretrained:
    """The base with other weights or another name, and the fingerprint of what it is now."""
    new = Pretrained(**{field: getattr(base, field) for field in base.__dataclass_fields__} | changes)
    return Pretrained(**new.__dict__ | {"fingerprint": fingerprint(new.params, new.config)})


def rows(reads: Any, prompts: Sequence[str], answers: Sequence[str]) -> dict[str, np.ndarray]:
    """tokens, mask, loss_mask int32 [N, T], padded on the right: an answer ends with EOS, and it alone is learnt."""
    whole = [reads(p + a)["input_ids"] + [reads.eos_token_id] for p, a in zip(prompts, answers, strict=True)]
    given = [len(reads(p)["input_ids"]) for p in prompts]
    shape = (len(whole), max(map(len, whole)))
    tokens, mask, learnt = (np.zeros(shape, np.int32) for _ in range(3))
    for i, (ids, start) in enumerate(zip(whole, given, strict=True)):
        tokens[i, : len(ids)], mask[i, : len(ids)], learnt[i, start : len(ids)] = ids, 1, 1
    return {"tokens": tokens, "mask": mask, "loss_mask": learnt}


def supervised(
    base: Pretrained,
    data: dict[str, np.ndarray],
    recipe: training.Recipe,
    workdir: Path,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> Pretrained:
    """The base after learning the rows with all its weights, in a folder of its own: the policy's starting point."""
    run = training.start(base, "full", lm.loss(base.model), recipe, seed, mesh=mesh)
    batch = Batches(data, recipe.batch_size, seed, recipe.micro_batches).batch
    digest = sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in data.values())).hexdigest()
    identity = {"base": base.fingerprint, "data": digest, "seed": seed, "recipe": common.jsonable(recipe)}
    options = {"label": "sft", "save_every": 0, "curve": ("loss",), "mesh": mesh}
    result = training.train(run, batch, recipe, workdir, identity, **options)
    learnt = jax.tree.map(np.asarray, result.state.variables(run.frozen)["params"])  # from wherever a mesh has them
    return renamed(base, name=f"{base.name}-sft", params=jax.tree.map(jnp.asarray, learnt))


# ---------------------------------------------------------------------------------- tasks whose answers can be checked


class Task(NamedTuple):
    """prompts are all there are; answer: prompt -> the one right completion. sft_steps: after so many a policy is right
    about half of the time, so that its samples differ.
    """

    alphabet: str
    prompts: tuple[str, ...]
    answer: Callable[[str], str]
    max_new: int
    sft_steps: int


def arithmetic(largest: int = 99) -> Task:
    """The sum of two numbers from 0 to `largest`."""
    numbers = range(largest + 1)
    prompts = tuple(f"{a}+{b}=" for a in numbers for b in numbers)
    answer = lambda prompt: str(sum(map(int, prompt.rstrip("=").split("+"))))  # noqa: E731
    return Task("0123456789+=", prompts, answer, len(str(2 * largest)) + 1, 800)


def sort(letters: str = "abcdefgh", longest: int = 6, count: int = 4000) -> Task:
    """Letters in their order, a letter as often as it is there."""
    words = np.random.Philox(key=0).random_raw((count, longest + 1)).astype(np.uint64)
    sizes = 2 + (words[:, 0] % np.uint64(longest - 1)).astype(int)
    drawn = [
        "".join(letters[int(x % len(letters))] for x in row[1 : 1 + n]) for row, n in zip(words, sizes, strict=True)
    ]
    prompts = tuple(f"{word}=" for word in dict.fromkeys(drawn))
    return Task(letters + "=", prompts, lambda prompt: "".join(sorted(prompt.rstrip("="))), longest + 1, 100)


TASKS: dict[str, Callable[[], Task]] = {"arithmetic": arithmetic, "sort": sort}


def task(name: str) -> Task:
    """Raises FlagError: no such task."""
    if name not in TASKS:
        raise FlagError(f"no task {name!r}.{did_you_mean(name, TASKS)}")
    return TASKS[name]()


def split(prompts: Sequence[str], held_out: int = 10) -> tuple[list[str], list[str]]:
    """(train, held out): one of `held_out` prompts is held out, by its hash."""
    out: tuple[list[str], list[str]] = ([], [])
    for prompt in prompts:
        out[sha256(prompt.encode()).digest()[0] % held_out == 0].append(prompt)
    return out


def right(answer: Callable[[str], str]) -> RewardFn:
    """1 for the right answer and nothing else, 0 for any other."""
    return lambda prompts, completions: [float(c == answer(p)) for p, c in zip(prompts, completions, strict=True)]
