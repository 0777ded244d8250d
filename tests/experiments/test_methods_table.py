"""The README's table of methods is what their files say."""

import re
import runpy
from types import SimpleNamespace

import jax
import pytest

from research.errors import DataError, ModelError
from research.peft import method as peft
from research.peft import registry
from research.peft.merge import merge
from tests import tiny
from tests.experiments.script import refused, run

params = SimpleNamespace(**runpy.run_module("experiments.params"))  # runpy warns when it runs what is imported
PAGE = params.PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def table() -> str:
    return run("params", "--methods").out


def cells(table: str) -> list[list[str]]:
    """The rows' cells; a | inside one is escaped."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()[2:]]


def test_the_page_is_fresh(table: str):
    committed = PAGE.split(params.MARKERS[0])[1].split(params.MARKERS[1])[0]
    assert committed == table, "the README's table is old: python -m experiments.params --methods --write"


def test_every_method_has_a_row(table: str):
    names = [re.match(r"`(\w+)", row[0]).group(1) for row in cells(table)]
    assert names == registry.names()
    assert {len(row) for row in cells(table)} == {len(params.HEADINGS)}


def test_some_rows_are_what_the_papers_say(table: str):
    rows = {row[0].strip("`"): row[2:] for row in cells(table)}
    assert rows["lora"] == ["reparametrisation", "linear", "yes", "yes", "460,800", "yes", "none"]
    assert rows["houlsby"] == ["additive", "residual", "no", "no", "4,497,216", "yes", "extra FFN"]
    assert rows["prefix"][:4] == ["additive", "attention, embed", "no", "no"]
    assert rows["bitfit"] == ["selective", "-", "is the base", "yes", "- (this model has no biases)", "yes", "none"]
    assert rows["fishmask"][4] == "a part of 134,515,008"
    assert rows["full"][4] == "134,515,008"


@pytest.mark.parametrize("name", registry.names())
def test_what_the_table_says_merges_does(name: str, table: str):
    said = next(row[4] for row in cells(table) if re.match(rf"`{name}\b", row[0]))
    case = tiny.case(registry.small(name), "decoder")
    shapes = jax.eval_shape(lambda rng: peft.init(case.method, rng, case.sites), jax.random.key(0))
    variables = {"params": tiny.params(case.config), "peft": shapes}
    realised = jax.eval_shape(lambda v: peft.realised(case.method, v, case.sites), variables)
    if said == "no":
        with pytest.raises(ModelError, match="can't be merged"):
            jax.eval_shape(merge, realised)
    else:
        assert "peft" not in jax.eval_shape(merge, realised)


def test_links():
    assert params.link("2106.09685") == "[2106.09685](https://arxiv.org/abs/2106.09685)"
    assert params.link("2022.findings-naacl.64").endswith("(https://aclanthology.org/2022.findings-naacl.64)")
    assert params.link("openreview:TwJrTz9cRS").endswith("(https://openreview.net/forum?id=TwJrTz9cRS)")
    assert params.link("-") == "-"


def test_the_table_goes_between_the_markers():
    begin, end = params.MARKERS
    assert params.with_table(f"a\n{begin}old\n{end}b\n", "new\n") == f"a\n{begin}new\n{end}b\n"
    assert params.with_table(PAGE, PAGE.split(begin)[1].split(end)[0]) == PAGE
    for page in ("a\n", f"a\n{begin}b\n", f"{end}{begin}"):
        with pytest.raises(DataError, match="lacks its markers"):
            params.with_table(page, "new\n")


def test_write_needs_methods():
    refused(run("params", "--write"), 2, "--write", "--methods")
