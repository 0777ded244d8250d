"""Counts what a PEFT method trains on a model, from shapes alone: no weights are read, so a 70B model takes seconds.

    python -m experiments.params --model=llama3-70b --peft=lora:rank=16,targets=all
    python -m experiments.params --model=bert-base --peft=bitfit --tree

The last line is `trainable=<int> total=<int> percent=<float>`; total includes what the method added, task heads are
apart. `--peft=full` counts the model itself.
"""

import re

import jax
from absl import flags

from experiments import common
from research.convert.load import load_config
from research.errors import FlagError
from research.models.registry import PRESETS, build
from research.peft import method as peft
from research.peft import registry, tree


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    flags.DEFINE_string(
        "model", "bert-base", "Preset, packaged name, directory of Hugging Face files, .gguf file or hub id."
    )
    flags.DEFINE_string(
        "peft", "lora", "Method specification, such as lora:rank=8,targets=attn/(q|v) or houlsby+bitfit."
    )
    flags.DEFINE_bool("tree", False, "Print every leaf, with what trains marked by *.")
    flags.DEFINE_bool("list", False, "Print the known models and methods, and exit.")


def main() -> None:
    values = flags.FLAGS
    if values.list:
        print("models:  " + ", ".join(sorted(PRESETS)))
        print("methods: " + ", ".join(registry.names()))
        return
    variables, mask, sites = shapes(values.model, values.peft)
    if values.tree:
        print_tree(variables, mask)
    by_part = {name: tree.count(variables[name], mask[name]) for name in variables}
    trainable, total = sum(by_part.values()), peft.parameters(variables)
    print(f"{values.model}  {values.peft}")
    print(f"  base {tree.count(variables['params']):,} parameters, of which {by_part['params']:,} train")
    print(f"  added {total - tree.count(variables['params']):,}, of which {by_part['peft']:,} train")
    print(f"trainable={trainable} total={total} percent={100 * trainable / total:.6f}")


def shapes(model: str, spec: str) -> tuple[dict, dict, dict]:
    """The abstract variables, the mask and the sites. A method that trains nothing but a head trains nothing here."""
    method, module = registry.parse(spec), build(load_config(model))
    params, _ = peft.base(module)
    sites = peft.sites(module)
    variables = {"params": params, "peft": jax.eval_shape(lambda: peft.init(method, jax.random.key(0), sites))}
    if spec.strip() == "linear_probe":
        raise FlagError(
            "linear_probe trains only a task's head, and heads are counted apart: there is nothing to count. "
            "Valid: --peft=full for the model itself."
        )
    return variables, peft.mask(method, variables), sites


def print_tree(variables: dict, mask: dict) -> None:
    """One line a leaf: mark, path, shape."""
    flat = tree.paths(mask)
    width = max(map(len, flat))
    for path, leaf in tree.paths(variables).items():
        shape = re.sub(r",?\)", "]", str(tuple(leaf.shape)).replace("(", "["))
        print(f"{'*' if tree.trains(flat[path]) else ' '} {path:{width}} {shape} {leaf.dtype}")


if __name__ == "__main__":
    define_flags()
    common.run(main)
