"""Turns an adapter directory of Hugging Face PEFT into one of this project, and the other way round.

    python -m experiments.convert_adapter --adapter=DIR --to=peftree --output=runs/adapter --model=NAME
    python -m experiments.convert_adapter --adapter=runs/adapter --to=hf --output=DIR

What was written is read again and compared with the adapter on a fixed input before it takes its place. A classifier is
converted with its head; Hugging Face PEFT's files do not name its classes: --classes does.
"""

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.shared import common
from experiments.shared.classification import attach
from research.convert import hf_peft
from research.convert.load import Pretrained, load
from research.errors import FlagError, ModelError
from research.peft import adapter as adapters
from research.peft import method as peft
from research.peft import registry
from research.peft.method import Sites, Variables
from research.tasks.loss import model_variables

TOLERANCE = 1e-5  # of hidden states of order one, in fp32


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    flags.DEFINE_string("adapter", None, "Adapter directory to read.", required=True)
    flags.DEFINE_enum("to", None, ["hf", "peftree"], "Whose format to write.", required=True)
    flags.DEFINE_string("output", None, "Directory to write; it must not exist, or hold an earlier one.", required=True)
    flags.DEFINE_string("model", None, "The base, where it is not the one that the adapter names.")
    flags.DEFINE_bool("force", False, "Convert although the adapter was trained on another base.")
    flags.DEFINE_list("classes", None, "A classifier's classes, in order; default: LABEL_0, LABEL_1, ...")
    flags.DEFINE_integer("max_length", 128, "Tokens a classifier's row is cut to.", lower_bound=3)


def main() -> None:
    values = flags.FLAGS
    base, spec, variables = from_peftree(values) if values.to == "hf" else from_hf(values)
    sites = peft.sites(base.model)

    def write(directory: Path) -> None:
        if values.to == "hf":
            hf_peft.save(directory, spec, variables, base.config, sites, base.name)
        else:
            named = {"name": base.name, "fingerprint": base.fingerprint}
            adapters.save(directory, spec, variables, sites, named, **classifier(values, variables))

    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / "adapter")
        if values.to == "hf":
            again = hf_peft.load(Path(scratch) / "adapter", base.config, base.params, sites)[:2]
        else:
            again = spec, attach(adapters.load(Path(scratch) / "adapter"), base, sites)
    difference = compare(base, sites, (spec, variables), again)
    if not difference <= TOLERANCE:
        raise ModelError(f"what was written differs from the adapter by {difference:.1e}: nothing was written.")
    write(Path(values.output))
    print(f"written: {values.output} ({spec}; equal within {difference:.1e})")


def from_peftree(values: flags.FlagValues) -> tuple[Pretrained, str, Variables]:
    """Reads our directory: base, specification, variables."""
    loaded = adapters.load(values.adapter)
    base = load(values.model or loaded.meta["base"]["name"])
    return base, loaded.meta["spec"], attach(loaded, base, peft.sites(base.model), values.force)


def from_hf(values: flags.FlagValues) -> tuple[Pretrained, str, Variables]:
    """Reads theirs."""
    name = values.model or base_name(Path(values.adapter) / hf_peft.CONFIG)
    base = load(name)
    spec, variables, notes = hf_peft.load(values.adapter, base.config, base.params, peft.sites(base.model))
    for note in notes:
        print(f"note: {note}.")
    return base, spec, variables


def base_name(file: Path) -> str:
    """What an adapter_config.json says of its base. Raises FlagError where it says nothing."""
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        raise ModelError(f"{file.parent} is no adapter of Hugging Face PEFT: it has no readable {file.name}.") from None
    if not name:
        raise FlagError(f"{file} does not name its base: give --model.")
    return name


def classifier(values: flags.FlagValues, variables: Variables) -> dict:
    """What adapter.json says of a classifier."""
    if "head" not in variables:
        return {}
    count = variables["head"]["kernel"].shape[1]
    classes = values.classes or [f"LABEL_{i}" for i in range(count)]
    if len(classes) != count:
        raise FlagError(f"--classes={','.join(classes)} names {len(classes)} classes; the head has {count}.")
    return {"task": "classify", "classes": classes, "max_length": values.max_length}


def compare(base: Pretrained, sites: Sites, *adapted: tuple[str, Variables]) -> float:
    """The largest difference of two adapters' hidden states on 2 x 16 fixed tokens, relative above 1, and of heads."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, base.config.vocab_size, (2, 16)), jnp.int32)

    def hidden(spec: str, variables: Variables) -> list[jax.Array]:
        v = peft.realised(registry.parse(spec), variables, sites)
        with jax.default_matmul_precision("highest"):
            return [jax.jit(base.model.apply)(model_variables(v), tokens), *jax.tree.leaves(variables.get("head"))]

    pairs = zip(*(hidden(*one) for one in adapted), strict=True)
    return max(float(jnp.max(jnp.abs(a - b) / jnp.maximum(1.0, jnp.abs(a)))) for a, b in pairs)


if __name__ == "__main__":
    define_flags()
    common.run(main)
