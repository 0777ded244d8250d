"""Counts what a PEFT method trains on a model, from shapes alone: no weights are read, so a 70B model takes seconds.

    python -m experiments.params --model=llama3-70b --peft=lora:rank=16,targets=all
    python -m experiments.params --model=bert-base --peft=bitfit --tree
    python -m experiments.params --paper      # every figure of the papers beside what is counted here
    python -m experiments.params --methods    # every method: the README's table

The last line is `trainable=<int> total=<int> percent=<float>`; total includes what the method added, task heads are
apart. `--peft=full` counts the model itself.
"""

import re
from dataclasses import replace
from pathlib import Path

import jax
from absl import flags

from experiments.shared import common, paper_counts
from research.convert.load import load_config
from research.errors import DataError, FlagError
from research.files import write_text
from research.models.registry import PRESETS, build
from research.nn.sites import Site
from research.peft import method as peft
from research.peft import registry, tree
from research.peft.merge import mergeable

PAGE = Path(__file__).parents[1] / "README.md"
MARKERS = ("<!-- the table -->\n", "<!-- its end -->\n")
METHODS_MODEL = "smollm2-135m"
HEADINGS = ("method", "paper", "kind", "sites", "merges", "a fresh one is the base", "trainable on SmolLM2-135M",
            "saves training memory", "costs in inference")  # fmt: skip


def define_flags() -> None:
    """Only where this is the script: other scripts' flags have the same names."""
    flags.DEFINE_string(
        "model", "bert-base", "Preset, packaged name, directory of Hugging Face files, .gguf file or hub id."
    )
    flags.DEFINE_string("peft", "lora", "Method specification, such as lora:rank=8,targets=attn/(q|v) or lora+bitfit.")
    flags.DEFINE_bool("untie", False, "Give a model whose output is its token table a projection of its own.")
    flags.DEFINE_bool("tree", False, "Print every leaf, with what trains marked by *.")
    flags.DEFINE_bool("list", False, "Print the known models and methods, and exit.")
    flags.DEFINE_bool("paper", False, "Check the papers' figures; exit with 1 where one is not what is counted here.")
    flags.DEFINE_bool("methods", False, "Print the table of methods.")
    flags.DEFINE_bool("write", False, "With --methods: write the table into the README instead.")


def main() -> None:
    values = flags.FLAGS
    if values.write and not values.methods:
        raise FlagError("--write is for --methods: nothing else here is written to a file.")
    if values.list:
        print("models:  " + ", ".join(sorted(PRESETS)))
        print("methods: " + ", ".join(registry.names()))
    elif values.paper:
        paper_counts.table()
    elif values.write:
        write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8"), methods_table()))
    elif values.methods:
        print(methods_table(), end="")
    else:
        print_counts(values.model, values.peft, values.tree, values.untie)


def print_counts(model: str, spec: str, whole_tree: bool, untied: bool = False) -> None:
    """The counts of one method on one model."""
    variables, mask, sites = shapes(model, spec, untied)
    if whole_tree:
        print_tree(variables, mask)
    by_part = {name: tree.count(variables[name], mask[name]) for name in variables}
    trainable, total = sum(by_part.values()), peft.parameters(variables)
    print(f"{model}  {spec}")
    print(f"  base {tree.count(variables['params']):,} parameters, of which {by_part['params']:,} train")
    print(f"  added {total - tree.count(variables['params']):,}, of which {by_part['peft']:,} train")
    print(f"trainable={trainable} total={total} percent={100 * trainable / total:.6f}")


def shapes(model: str, spec: str, untied: bool = False) -> tuple[dict, dict, dict]:
    """The abstract variables, the mask and the sites. A method that trains nothing but a head trains nothing here."""
    config = load_config(model)
    method, module = registry.parse(spec), build(replace(config, tie_embeddings=False) if untied else config)
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


def methods_table() -> str:
    """The Markdown table of all methods, from their files and from shapes."""
    module = build(PRESETS[METHODS_MODEL])
    params, sites = peft.base(module)[0], peft.sites(module)
    rows = [method_cells(name, params, sites) for name in registry.names()]
    return "\n".join(map(paper_counts.line, [HEADINGS, ["---"] * len(HEADINGS), *rows])) + "\n"


def method_cells(name: str, params: dict, sites: dict[str, Site]) -> list[str]:
    """A method's row: what its card says, and what its default does on a model of these shapes.

    A method that has no default is shown with its card's options.
    """
    card, spec = registry.card(name), name
    try:
        method = registry.parse(spec)
    except FlagError:
        method = registry.parse(spec := registry.small(name))
    variables = {"params": params, "peft": jax.eval_shape(lambda: peft.init(method, jax.random.key(0), sites))}
    realised = jax.eval_shape(lambda v: peft.realised(method, v, sites), variables)
    nodes = [n for n in tree.paths(realised["peft"], is_leaf=peft.is_node).values() if n.kind != peft.REPARAM]
    return [
        f"`{spec}`",
        link(card.paper),
        card.kind,
        ", ".join(sorted({node.kind for node in nodes})) or "-",
        ("yes" if all(map(mergeable, nodes)) else "no") if nodes else "is the base",
        "yes" if method.identity else "no",
        trainable(name, method, variables),
        card.memory,
        card.inference,
    ]


def link(paper: str) -> str:
    """A card's paper: arXiv's number, the ACL Anthology's, or openreview:ID."""
    if paper == "-":
        return paper
    archive, _, number = paper.rpartition(":")
    arxiv = re.fullmatch(r"\d{4}\.\d{5}", number)
    site = {"openreview": "openreview.net/forum?id="}.get(archive, "arxiv.org/abs/" if arxiv else "aclanthology.org/")
    return f"[{paper}](https://{site}{number})"


def trainable(name: str, method: peft.Method, variables: dict) -> str:
    """The count, or why the model refuses the method; what `fit` will choose from, where it chooses."""
    try:
        mask = peft.mask(method, variables)
    except FlagError as error:
        reason = re.split(r"[.,;] ", str(error).removeprefix(f"{name}: "))[0]
        return f"- ({reason})"
    unknown = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(mask))
    return ("a part of " if unknown else "") + f"{tree.count(variables, mask):,}"


def with_table(page: str, table: str) -> str:
    """The page with `table` between its markers. Raises DataError where it has none."""
    head, begin, rest = page.partition(MARKERS[0])
    _, end, tail = rest.partition(MARKERS[1])
    if not end:
        raise DataError(f"{PAGE.name} lacks its markers, {' and '.join(map(str.strip, MARKERS))}: nothing is written.")
    return head + begin + table + end + tail


if __name__ == "__main__":
    define_flags()
    common.run(main)
