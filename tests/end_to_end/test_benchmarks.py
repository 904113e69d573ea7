"""The benchmarks work as a user runs them; their limits here are loose, for a busy machine."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def quick_reports() -> dict[str, Any]:
    finished = run_benchmarks("--quick", "--json")
    assert finished.returncode == 0, finished.stderr
    return {report["benchmark"]: report for report in json.loads(finished.stdout)["reports"]}


def middle_half(report: dict[str, Any], table: int, name: str) -> tuple[float, float]:
    """Where the middle half of the ratios lies: on a busy machine, a wide range."""
    rows = {row["name"]: row for row in report["tables"][table]["rows"]}
    ratio = rows[name]["ratio"]
    return ratio["low"], ratio["high"]


def test_every_listed_benchmark_reports(quick_reports: dict[str, Any]) -> None:
    """A run without names covers every benchmark that the list shows."""
    listed = [line.split()[0] for line in run_benchmarks("--list").stdout.splitlines()]
    assert listed == list(quick_reports)


def test_dispatch_is_near_the_bare_calls(quick_reports: dict[str, Any]) -> None:
    """A channel of ten hooks costs about what calling their methods costs."""
    ten_hooks = quick_reports["dispatch"]["tables"][1]
    assert ten_hooks["title"].startswith("10 hooks")
    low, high = middle_half(quick_reports["dispatch"], 1, "channel.run")
    assert low < 2.0
    assert high > 0.7


@pytest.mark.parametrize("benchmark", ["overhead", "accumulation", "bf16"])
def test_a_step_is_near_the_bare_loops(quick_reports: dict[str, Any], benchmark: str) -> None:
    """A step of the trainer costs little more than the bare loop's, and less than Accelerate's."""
    report = quick_reports[benchmark]
    _, accelerate_high = middle_half(report, 0, "Accelerate, plain loop")
    for hooks in (0, 10):
        low, high = middle_half(report, 0, f"this trainer, {hooks} hooks")
        assert low < min(1.5, accelerate_high)
        assert high > 0.7


@pytest.mark.parametrize("benchmark", ["overhead", "accumulation", "bf16"])
def test_all_contenders_train_alike(quick_reports: dict[str, Any], benchmark: str) -> None:
    """Every contender ends with the weights of the bare loop, bit for bit."""
    report = quick_reports[benchmark]
    assert report["faults"] == []
    notes = report["tables"][0]["notes"]
    assert notes == ["All end with the weights of the bare loop, bit for bit."]


def test_an_unknown_name_is_refused() -> None:
    """A name that is no benchmark's is refused with the names that there are."""
    finished = run_benchmarks("no_such_benchmark")
    assert finished.returncode == 2
    assert "no benchmark named no_such_benchmark; there are dispatch, overhead" in finished.stderr


def test_tables_are_plain_markdown_outside_a_terminal() -> None:
    """What is not a terminal gets Markdown tables with the bar and whether it is met."""
    finished = run_benchmarks("dispatch", "--quick")
    assert finished.returncode == 0, finished.stderr
    assert "| bare calls " in finished.stdout
    assert "<= 1.3: " in finished.stdout
    assert "\x1b[" not in finished.stdout
