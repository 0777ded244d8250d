"""The names in Hugging Face PEFT's adapter files: of tensors, one entry for a node's class, and of modules.

    Key("a", "lora_A.weight", "r i", "i r"): field `a` [i, r] of a node is MODULE.lora_A.weight (r, i) in the file

Letters name axes; a 1 is an axis that ours has not. Along r, a rank, a file may hold fewer rows than ours: layers that
are stacked here may have different ranks there, and the rows of ours that are not there are zeros.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from research.convert.config import Config, Json
from research.convert.names import depth, prefix, table
from research.errors import ModelError
from research.models.bert import BertConfig
from research.peft.adalora import Svd
from research.peft.boft import Boft
from research.peft.dora import Dora
from research.peft.fourierft import FourierFt
from research.peft.hira import Hira
from research.peft.hra import Hra
from research.peft.ia3 import Scale, ScaleInput
from research.peft.llama_adapter import Adaption
from research.peft.loha import Loha
from research.peft.lokr import Lokr
from research.peft.lora import Lora
from research.peft.miss import Bat, Miss
from research.peft.oft import Oft
from research.peft.shira import Shira
from research.peft.vera import Projections, Vera


class Key(NamedTuple):
    """A field of a node, the end of its key in their file, and the axes of both."""

    field: str
    suffix: str
    theirs: str
    ours: str

    def shape(self, ours: tuple[int, ...], rank: int | None) -> tuple[int, ...]:
        """Their shape for a leaf of one layer, of which `rank` rows count."""
        sizes = dict(zip(self.ours.split(), ours, strict=True)) | {"1": 1}
        if rank is not None and "r" in sizes:
            sizes["r"] = rank
        return tuple(sizes[letter] for letter in self.theirs.split())

    def read(self, value: np.ndarray) -> np.ndarray:
        """Theirs to ours."""
        letters = self.theirs.replace("1", "").split()
        value = value.reshape([n for n, letter in zip(value.shape, self.theirs.split(), strict=True) if letter != "1"])
        return value.transpose([letters.index(letter) for letter in self.ours.split()])

    def write(self, value: np.ndarray) -> np.ndarray:
        """Ours to theirs."""
        letters, ours = self.theirs.split(), self.ours.split()
        value = value.transpose([ours.index(letter) for letter in letters if letter != "1"])
        for axis, letter in enumerate(letters):
            value = np.expand_dims(value, axis) if letter == "1" else value
        return np.ascontiguousarray(value)

    def at(self, rows: np.ndarray | None) -> tuple:
        """The index of some ranks in ours."""
        return tuple(rows if letter == "r" and rows is not None else slice(None) for letter in self.ours.split())


_LORA = (Key("a", "lora_A.weight", "r i", "i r"), Key("b", "lora_B.weight", "o r", "r o"))
KEYS: dict[type, tuple[str, tuple[Key, ...]]] = {
    Lora: ("LORA", _LORA),
    Dora: ("LORA", (*_LORA, Key("m", "lora_magnitude_vector", "o", "o"))),
    Svd: ("ADALORA", (
        Key("p", "lora_A", "r i", "i r"), Key("lam", "lora_E", "r 1", "r"), Key("q", "lora_B", "o r", "r o"),
    )),
    Scale: ("IA3", (Key("l", "ia3_l", "o 1", "o"),)),
    ScaleInput: ("IA3", (Key("l", "ia3_l", "1 i", "i"),)),
    Vera: ("VERA", (Key("d", "vera_lambda_d", "r", "r"), Key("b", "vera_lambda_b", "o", "o"))),
    Projections: ("VERA", (Key("a", "vera_A", "r i", "i r"), Key("b", "vera_B", "o r", "r o"))),
    Loha: ("LOHA", (
        Key("a1", "hada_w1_b", "r i", "i r"), Key("b1", "hada_w1_a", "o r", "r o"),
        Key("a2", "hada_w2_b", "r i", "i r"), Key("b2", "hada_w2_a", "o r", "r o"),
    )),
    Lokr: ("LOKR", (
        Key("w1", "lokr_w1", "l m", "m l"), Key("w2", "lokr_w2", "k n", "n k"),
        Key("w1_a", "lokr_w1_b", "s m", "m s"), Key("w1_b", "lokr_w1_a", "l s", "s l"),
        Key("w2_a", "lokr_w2_b", "s n", "n s"), Key("w2_b", "lokr_w2_a", "k s", "s k"),
    )),
    Oft: ("OFT", (Key("q", "oft_R.weight", "k e", "k e"),)),
    Boft: ("BOFT", (Key("r", "boft_R", "m k b c", "m k b c"), Key("scale", "boft_s", "o 1", "o"))),
    Hra: ("HRA", (Key("u", "hra_u", "i s", "i s"),)),
    FourierFt: ("FOURIERFT", (Key("spectrum", "fourierft_spectrum", "n", "n"),)),
    Miss: ("MISS", (Key("m", "miss_block", "s o", "s o"),)),
    Bat: ("MISS", (Key("m", "miss_block", "k b a", "k a b"),)),
    Shira: ("SHIRA", (Key("values", "shira_weight", "n", "n"),)),
    Hira: ("HIRA", (Key("a", "hira_A", "r i", "i r"), Key("b", "hira_B", "o r", "r o"))),
    Adaption: ("ADAPTION_PROMPT", (
        Key("prompt", "adaption_prompt", "1 p d", "p d"), Key("gate", "adaption_gate", "g", "g"),
    )),
}  # fmt: skip
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SOFT = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")  # these have one tensor, prompt_embeddings
UNDER = "base_model.model."  # their name of the model that holds the modules
NORMS = r"(.*/)?\w*norm/(scale|bias)"
PADDED = (Lora, Loha, Hira)  # a rank whose vectors are zeros on both sides is one that is not there


def of(node: Any) -> tuple[str, tuple[Key, ...]] | None:
    """Their peft_type and keys for a node: those of its class, or of a parent."""
    return next((KEYS[cls] for cls in type(node).__mro__ if cls in KEYS), None)


def rows(node: Any, fresh: bool = False) -> np.ndarray | None:
    """The ranks that a node of one layer has, as indices along r; None where all count.

    fresh: all singular values of AdaLoRA are 0 because none has trained, not because all were cut.
    """
    if isinstance(node, Svd):
        return np.arange(node.lam.size) if fresh else np.flatnonzero(node.lam)
    if not isinstance(node, PADDED):
        return None
    used = [np.moveaxis(getattr(node, key.field), key.ours.split().index("r"), 0) for key in of(node)[1]]
    used = np.flatnonzero(np.any([np.any(x.reshape(len(x), -1), axis=1) for x in used], axis=0))
    return np.arange(used[-1] + 1 if used.size else 0)


def signed(node: Any, value: np.ndarray) -> np.ndarray:
    """Without Neumann's series their rotation is the inverse of ours."""
    return -value if isinstance(node, Oft) and not node.neumann else value


# ------------------------------------------------------------------------------------------------------------- modules


def linears(config: Config, headless: bool) -> dict[str, tuple[str, int]]:
    """{their module's name: (our site, as if scanned, and the layer)} of every projection.

    headless: names of the bare model (BertModel, LlamaModel), not of one with a head. A part of a projection that they
    fuse (GPT-2's and BLOOM's query, key and value) has no module of its own, and a patch embedding is a convolution.
    """
    start, out = "" if headless else prefix(config), {}
    for row in table(config):
        if row.ours.endswith("/kernel") and row.part is None and row.form is None:
            name = (row.theirs if row.top else start + row.theirs).removesuffix(".weight")
            out |= {name.format(i=i): (row.ours.removesuffix("/kernel"), i) for i in range(depth(config, row))}
    return out


def attentions(config: Config, top: int | None = None) -> list[tuple[str, tuple[str, int]]]:
    """The same of the attention modules, of the `top` last layers."""
    found = [
        (name.rpartition(".")[0], i) for name, (site, i) in linears(config, False).items() if site == "layers/attn/q"
    ]
    return [(name, ("layers/attn/kv", i)) for name, i in found[-(config.num_layers if top is None else top) :]]


def norms(config: Config, headless: bool) -> dict[str, tuple[str, int]]:
    """The same of every leaf of a norm, by their parameter's name."""
    start, out = "" if headless else prefix(config), {}
    for row in table(config):
        if re.fullmatch(NORMS, row.ours):
            out |= {(start + row.theirs).format(i=i): (row.ours, i) for i in range(depth(config, row))}
    return out


def matched(names: Iterable[str], c: Json, option: str = "target_modules") -> set[str]:
    """The modules that an adapter's configuration chooses, by their rules: a string is a regular expression for the
    whole name (but for "all-linear"), an item of a list is a name or its end.
    """
    targets, layers, excluded = c.get(option), c.get("layers_to_transform"), c.get("exclude_modules") or []
    if not targets:
        raise ModelError(f"adapter_config.json names no {option}.")

    def fits(name: str, patterns: str | list[str]) -> bool:
        if patterns == "all-linear":
            return name != "lm_head"
        if isinstance(patterns, str):
            return re.fullmatch(patterns, name) is not None
        return any(name == p or name.endswith(f".{p}") for p in patterns)

    def here(name: str) -> bool:
        number = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        numbers = [layers] if isinstance(layers, int) else layers
        return isinstance(targets, str) or not numbers or (number is not None and int(number[1]) in numbers)

    try:
        return {name for name in names if fits(name, targets) and here(name) and not fits(name, excluded)}
    except re.error as error:
        raise ModelError(f"{option}={targets!r} is not a regular expression: {error}.") from None


def named(wanted: set[str], names: Iterable[str]) -> list[str]:
    """A list of target_modules that chooses the wanted ones of all names: last names if those are enough."""
    names = {*names, "classifier", "score"}
    short = {name.rpartition(".")[2] for name in wanted}
    return sorted(short if matched(names, {"target_modules": list(short)}) == wanted else wanted)


def pattern(paths: set[str], everything: set[str]) -> str:
    """Our pattern for sites: layers/attn/q, layers/attn/v -> attn/(q|v)."""
    inside = {path for path in everything if path.startswith("layers/")}
    if paths == inside:
        return "all"
    groups: dict[str, list[str]] = {}
    for path in sorted(paths):
        parent, _, last = path.removeprefix("layers/").rpartition("/")
        groups.setdefault(parent, []).append(last)
    several = lambda names: names[0] if len(names) == 1 else f"({'|'.join(names)})"  # noqa: E731
    return "|".join((f"{parent}/" if parent else "") + several(names) for parent, names in groups.items())


class Place(NamedTuple):
    """One layer of a node: the index in its leaves, the site (as if scanned), its number, and their module."""

    index: Any
    site: str
    layer: int
    module: str


def places(path: str, names: dict[tuple[str, int], str], depth: int) -> list[Place]:
    """The layers of the node at a path that have a name."""
    head, _, rest = path.rpartition("/")[0].partition("/")
    site = f"layers/{rest}" if head.startswith("layers") else head
    found = [(i, i) for i in range(depth)] if head == "layers" else [((), number(path))]
    return [Place(index, site, i, names[site, i]) for index, i in found if (site, i) in names]


def number(path: str) -> int:
    """The layer's, where it is not stacked."""
    found = re.match(r"layers_(\d+)", path)
    return int(found[1]) if found else 0


def locate(flat: dict[str, Any], ours: str, layer: int) -> tuple[str, Any]:
    """Where one layer of a leaf of the base is: the leaf's path, scanned or not, and the index in it."""
    if ours in flat:
        return ours, layer if ours.startswith("layers/") else ()
    return ours.replace("layers/", f"layers_{layer}/", 1), ()


def head_name(kind: str, config: Config) -> str:
    """Of a classifier's tensors."""
    return ("base_model." if kind in SOFT else UNDER) + ("classifier" if isinstance(config, BertConfig) else "score")


# ------------------------------------------------------------------------------------------------------ torch's numbers


def torch_places(seed: int, size: int, count: int) -> np.ndarray:
    """`torch.randperm(size, generator=seeded)[:count]`: the first swaps of a Fisher-Yates shuffle."""
    if size >= (2**32 - 1) // 20:  # above, torch draws 64 bits in a way of its own
        raise ModelError(f"a kernel of {size} elements is too large to find the places that torch draws in it.")
    moved, out = {}, []
    for i, draw in enumerate(np.random.RandomState(seed).randint(0, 2**32, count, dtype=np.uint32)):
        j = i + int(draw) % (size - i)
        out.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return np.asarray(out, np.int32)


def torch_uniform(rng: np.random.RandomState, shape: tuple[int, ...], limit: float) -> np.ndarray:
    """`torch.empty(shape).uniform_(-limit, limit)`: 24 bits a number, rounded once."""
    bits = rng.randint(0, 2**32, int(np.prod(shape)), dtype=np.uint32) & np.uint32(2**24 - 1)
    high = np.float32(limit)
    return (bits * 2.0**-24 * np.float64(high + high) - np.float64(high)).astype(np.float32).reshape(shape)


def torch_where(seed: int, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Their places of Fourier coefficients, [2, n] in our order."""
    flat = torch_places(seed, shape[0] * shape[1], count)
    return np.stack([flat % shape[0], flat // shape[0]])
