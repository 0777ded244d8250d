"""`experiments.params`: exact counts in its last line, and one clear line for every slip."""

import resource
import subprocess
import sys

import pytest

from tests.experiments.script import refused, run


@pytest.mark.parametrize(
    ("model", "spec", "trainable"),
    [
        ("bert-base", "bitfit", 102_912),
        ("roberta-base", "lora:rank=8", 294_912),
        ("roberta-large", "lora:rank=8", 786_432),
        ("smollm2-135m", "lora:rank=8,targets=all", 2_442_240),
        ("smollm2-135m-instruct", "ia3", 57_600),
        ("bert-base", "houlsby:width=64", 2_417_664),
        ("bert-base", "full", 109_482_240),
    ],
)
def test_last_line_is_the_papers_count(model: str, spec: str, trainable: int):
    last = run("params", f"--model={model}", f"--peft={spec}").out.splitlines()[-1]
    assert last.startswith(f"trainable={trainable} total=")
    total = int(last.split("total=")[1].split()[0])
    assert float(last.split("percent=")[1]) == pytest.approx(100 * trainable / total, abs=1e-6)


def test_total_includes_what_is_added_but_no_setting():
    out = run("params", "--model=bert-base", "--peft=lora:rank=8").out
    assert f"total={109_482_240 + 294_912} " in out


def test_tree_marks_what_trains():
    lines = run("params", "--model=bert-base", "--peft=lora", "--tree").out.splitlines()
    marked = {line.split()[1] for line in lines if line.startswith("* ")}
    assert marked == {f"peft/layers/attn/{x}/lora/{leaf}" for x in "qv" for leaf in "ab"}


def test_a_70b_model_takes_seconds_and_little_memory():
    code = (
        "import re, runpy, sys\n"
        "sys.argv = ['params', '--model=llama3-70b', '--peft=lora:rank=16,targets=all']\n"
        "try: runpy.run_module('experiments.params', run_name='__main__')\n"
        "finally: print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read()).group(1))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "trainable=207093760" in out
    assert int(out[-1]) < 2 * 2**20, "kilobytes"
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 20


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--model=bert-bsae"], 4, ["'bert-bsae'", "Did you mean 'bert-base'?"]),
        (["--peft=lara"], 2, ["'lara'", "Did you mean 'lora'?"]),
        (["--peft=lora:rnak=8"], 2, ["'rnak'", "Did you mean 'rank'?"]),
        (["--peft=lora:rank=0"], 2, ["rank=0", "1"]),
        (["--peft=lora:rank=4000"], 2, ["rank=4000", "at most 768"]),
        (["--peft=lora:rank=eight"], 2, ["rank=eight", "int"]),
        (["--peft=lora:targets=attn/qq"], 2, ["attn/qq", "Did you mean 'attn/q'?"]),
        (["--peft=lora:targets=attn/(q"], 2, ["regular expression"]),
        (["--model=llama3-8b", "--peft=bitfit"], 2, ["no biases"]),
        (["--peft=linear_probe"], 2, ["head"]),
        (["--modle=bert-base"], 2, ["modle", "model"]),
        (["bert-base"], 2, ["'bert-base'", "--flag=value"]),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], status: int, words: list[str]):
    refused(run("params", *arguments), status, *words)
