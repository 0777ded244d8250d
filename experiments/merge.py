"""Folds an adapter into its base and writes the result as Hugging Face safetensors, which `transformers` loads.

    python -m experiments.merge --adapter=runs/classify/adapter --output=runs/merged

The merged model is compared with base and adapter on a fixed input before anything is written. A method that is no
change of weights (prefix, prompt, bottleneck adapters) can't be merged and is refused. A classification head is written
as the family's own (`BertForSequenceClassification`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.shared import common
from experiments.shared.classification import attach
from research.convert.export import export_hf
from research.convert.load import load
from research.errors import ModelError
from research.peft import adapter as adapters
from research.peft import method as peft
from research.peft.merge import merge
from research.tasks.loss import model_variables

TOLERANCE = 1e-4  # of hidden states of order one, in fp32


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    flags.DEFINE_string("adapter", None, "Adapter directory.", required=True)
    flags.DEFINE_string(
        "output", None, "Directory to write; it must not exist, or hold an earlier export.", required=True
    )
    flags.DEFINE_string("model", None, "The base, where it is not the one that the adapter names.")
    flags.DEFINE_bool("untie", False, "Give the base's output a projection of its own, as the adapter's run did.")
    flags.DEFINE_bool("force", False, "Merge although the adapter was trained on another base.")


def main() -> None:
    values = flags.FLAGS
    loaded = adapters.load(values.adapter)
    base = load(values.model or loaded.meta["base"]["name"], untie=values.untie)
    sites = peft.sites(base.model)
    variables = peft.realised(loaded.method, attach(loaded, base, sites, values.force), sites)
    merged = merge(variables)
    difference, effect = compare(base.model, variables, merged, base.params)
    print(f"merged = base + adapter within {difference:.1e}; the adapter moves the hidden states by up to {effect:.1e}")
    if not difference <= TOLERANCE * max(1.0, effect):
        raise ModelError(f"the merged model differs from base and adapter by {difference:.1e}: nothing was written.")
    if effect == 0.0:
        print("note: the adapter changes nothing but the head.")
    export_hf(
        values.output, base.config, merged["params"], base.tokenizer, merged.get("head"), loaded.meta.get("classes")
    )
    print(f"written: {values.output}")


def compare(model, variables: dict, merged: dict, params: dict) -> tuple[float, float]:
    """(largest difference of merged and unmerged, largest effect of the adapter) of the hidden states on 2 x 16 fixed
    tokens.
    """
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 16)), jnp.int32)
    apply = jax.jit(lambda v: model.apply(model_variables(v), tokens))
    with jax.default_matmul_precision("highest"):
        adapted, folded, bare = apply(variables), apply(merged), apply({"params": params})
    return float(jnp.max(jnp.abs(adapted - folded))), float(jnp.max(jnp.abs(adapted - bare)))


if __name__ == "__main__":
    define_flags()
    common.run(main)
