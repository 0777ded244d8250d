"""`experiments.params --paper`: every figure has its verdict, and a figure that is another fails."""

import re
import resource
import subprocess
import sys
from fractions import Fraction

import pytest

from experiments.shared import paper_counts
from experiments.shared.paper_rows import LATER, ROWS, SITES, Row
from research.errors import UserError
from research.models.registry import PRESETS
from research.peft import registry


@pytest.mark.slow
def test_the_command():
    code = (
        "import re, runpy, sys\n"
        "sys.argv = ['params', '--paper']\n"
        "try: runpy.run_module('experiments.params', run_name='__main__')\n"
        "finally: print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read()).group(1))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    *lines, summary, peak = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert int(peak) < 3 * 2**20, "kilobytes"
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 60
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:-1]]
    assert len(rows) == len(ROWS) and {len(row) for row in rows} == {7}
    verdicts = [row[-1].partition(":")[0] for row in rows]
    assert set(verdicts) - {"pending"} == {"equal", "rounds to", "known gap"}
    assert len(verdicts) - verdicts.count("pending") >= 60
    for verdict in set(verdicts):
        assert f"{verdicts.count(verdict)} {verdict}" in summary
    waiting = [family for family in LATER if any(paper_counts.pending(r) and r.model.startswith(family) for r in ROWS)]
    assert summary.endswith(f"pending ({', '.join(waiting)})") if waiting else "pending" not in summary


def test_every_method_is_here_but_of_families_to_come():
    for row in ROWS:
        if not paper_counts.pending(row):
            registry.parse(row.spec)
            assert row.model.partition(",")[0] in PRESETS | SITES, row


@pytest.mark.parametrize(
    ("printed", "value", "holds"),
    [
        ("0.3M", 294_912, True),
        ("0.3M", 250_000, True),
        ("0.3M", 249_999, False),
        ("3.0M", 3_171_840, False),
        ("110M", 109_482_240, True),
        ("330M", 335_141_888, False),
        ("125.0M", 124_055_040, False),
        ("409K", 409_600, False),
        ("102,912", 102_912, True),
        ("102,910", 102_912, False),
        ("2.1%", Fraction("2.149"), True),
        ("2.1%", Fraction("2.15"), False),
        ("0.01%", Fraction("0.00971"), True),
        ("1.2x", Fraction("1.173"), True),
        ("0", 0, True),
    ],
)
def test_rounding(printed: str, value: int | Fraction, holds: bool):
    assert paper_counts.rounds_to(printed, Fraction(value)) == holds


LORA = Row("LoRA", "2", "minilm-l6", "lora:rank=8", 73_728)


@pytest.mark.parametrize(
    ("changes", "computed", "verdict"),
    [
        ({}, "73,728", "equal"),
        ({"printed": "74K"}, "73,728", "rounds to"),
        ({"printed": "75K"}, "73,728", "FAILS: another figure is printed"),
        ({"exact": 73_729}, "73,728", "FAILS: the arithmetic gives 73,729"),
        ({"exact": 73_729, "printed": "75K", "gap": "why"}, "73,728", "FAILS: the arithmetic gives 73,729"),
        ({"printed": "75K", "gap": "why"}, "73,728", "known gap: why"),
        ({"printed": "74K", "gap": "why"}, "73,728", "FAILS: there is no gap"),
        ({"printed": "0.32%"}, "73,728 = 0.325%", "rounds to"),
        ({"spec": "lora:rnak=8"}, "", "FAILS: lora has no option 'rnak'. Did you mean 'rank'?"),
        ({"model": "later-1b"}, "", "pending"),
        ({"model": "smollm2-135m", "spec": "bitfit", "exact": 0}, "0", "equal"),
        ({"model": "minilm-l6, 2 classes", "spec": "bitfit", "exact": 26_882}, "26,882", "equal"),
        ({"total": True, "exact": 22_786_944}, "22,786,944", "equal"),
    ],
)
def test_verdicts(changes: dict, computed: str, verdict: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paper_counts, "LATER", ("later",))
    assert paper_counts.judge(LORA._replace(**changes)) == (computed, verdict)


def test_a_figure_that_fails_is_an_error(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paper_counts, "LATER", ("later",))
    rows = [LORA, LORA._replace(printed="75K"), LORA._replace(model="later-1b")]
    with pytest.raises(UserError, match="1 of 3 figures") as caught:
        paper_counts.table(rows)
    assert caught.value.exit_status == 1
    assert "3 figures: 1 equal, 1 FAILS, 1 pending (later)" in capsys.readouterr().out


def test_a_model_must_be_known():
    with pytest.raises(UserError, match="Did you mean 'minilm-l6'"):
        paper_counts.judge(LORA._replace(model="minilm-l7"))
