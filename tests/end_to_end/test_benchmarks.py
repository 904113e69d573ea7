"""Benchmarks run from the command line, and stored ratios hold."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.regression import MEASURED, STORED, compare
from benchmarks.report import Report, Row, Table
from benchmarks.results import Measured, page
from benchmarks.timing import Spread

ROOT = Path(__file__).resolve().parents[2]


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def quick_reports() -> dict[str, Any]:
    finished = run_benchmarks("--quick", "--json")
    assert finished.returncode == 0, finished.stderr
    return {report["benchmark"]: report for report in json.loads(finished.stdout)["reports"]}


def test_every_listed_benchmark_reports(quick_reports: dict[str, Any]) -> None:
    """A run without names covers every benchmark in the list."""
    listed = [line.split()[0] for line in run_benchmarks("--list").stdout.splitlines()]
    assert listed == list(quick_reports)


def test_speed_has_not_regressed() -> None:
    """A few ratios are at most 25 % above the stored ones, even on a busy machine."""
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.regression"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout == "as fast as stored\n"


def test_a_regression_is_reported_when_measured_twice() -> None:
    """A ratio over 25 % above its stored value is reported if a second measurement confirms."""
    once = iter([2.0, 1.0])
    measured = {"slow": lambda: 1.3, "slow once": lambda: next(once), "fine": lambda: 1.2}
    stored = dict.fromkeys(measured, 1.0)
    assert compare(measured, stored) == ["slow: 1.300, stored as 1.000, 30% more"]


def test_a_regression_is_reported_with_the_noise_of_the_stored_ratio() -> None:
    """The median of the stored measurements counts, and the line has their range."""
    measured = {"slow": lambda: 1.3, "fine": lambda: 1.2}
    stored = {name: [0.9, 0.95, 1.0, 1.1, 1.4] for name in measured}
    line = "slow: 1.300, stored as 1.000 (0.900 to 1.400 in 5 measurements), 30% more"
    assert compare(measured, stored) == [line]


def test_each_ratio_of_the_subset_is_stored() -> None:
    """The CI subset and the stored file name the same benchmarks."""
    assert set(json.loads(STORED.read_text(encoding="utf-8"))) == set(MEASURED)


@pytest.mark.parametrize("benchmark", ["overhead", "accumulation", "bf16"])
def test_all_contenders_train_equally(quick_reports: dict[str, Any], benchmark: str) -> None:
    """Every contender ends with the bare loop's weights, bit for bit."""
    report = quick_reports[benchmark]
    assert report["faults"] == []
    notes = report["tables"][0]["notes"]
    assert notes == ["All end with the weights of the bare loop, bit for bit."]


def test_complete_trainings_end_with_the_weights_of_a_plain_loop(
    quick_reports: dict[str, Any],
) -> None:
    """In each workload, this trainer does the plain loop's work and ends with equal weights."""
    report = quick_reports["end_to_end"]
    assert report["faults"] == []
    titles = [table["title"].partition(",")[0] for table in report["tables"]]
    assert titles == [
        "digits",
        "MLP on tensors in memory",
        "GPT of 10 M parameters",
        "behavior cloning policy",
    ]
    for table in report["tables"]:
        notes = {row["name"]: row["note"] for row in table["rows"]}
        assert [*notes] == ["plain loop", "this trainer"]
        assert notes["this trainer"].endswith("; equal weights")


def test_an_unknown_name_is_refused() -> None:
    """An unknown benchmark is refused with the list of names."""
    finished = run_benchmarks("no_such_benchmark")
    assert finished.returncode == 2
    assert "no benchmark named no_such_benchmark; there are dispatch, overhead" in finished.stderr


def test_tables_are_plain_markdown_outside_a_terminal() -> None:
    """Outside a terminal, tables are Markdown with each limit and its result."""
    finished = run_benchmarks("dispatch", "--quick")
    assert finished.returncode == 0, finished.stderr
    assert "| bare calls " in finished.stdout
    assert "<= 1.3: " in finished.stdout
    assert "\x1b[" not in finished.stdout


def test_the_page_states_whether_each_bar_is_met() -> None:
    """RESULTS.md lists each limit, and each miss with its size and reason."""
    rows = [
        Row("reference", Spread.of([10.0])),
        Row("met", Spread.of([10.5]), Spread.of([1.05]), bar=1.1),
        Row("missed", Spread.of([12.1]), Spread.of([1.21]), bar=1.1),
    ]
    report = Report("dispatch", [Table("Calls", "ns", rows)], environment={"CPU": "one"})
    remarks = {"dispatch": {"text": "Of no weight.", "missed": "Tried: nothing."}}
    text = page({"dispatch": Measured(report, "2026-01-01", "abc")}, remarks)
    assert "| dispatch | Calls: met | 1.050 | 1.1 | met |" in text
    assert "| dispatch | Calls: missed | 1.210 | 1.1 | MISSED by 10.0% |" in text
    assert "**dispatch, missed**: 1.210 where 1.1 is asked, 10.0% over. Tried: nothing." in text
    assert "on 2026-01-01, at commit abc: CPU one." in text
    assert "Of no weight." in text
    assert "Not measured: overhead," in text
