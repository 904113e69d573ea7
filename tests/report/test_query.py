"""Queries over runs: fields, conditions, order, and results as rows, files and frames."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest

from robo_orchard_core.utils.config.errors import ConfigError
from robo_orchard_lab.report.fields import read_runs_of
from robo_orchard_lab.report.query import check_suffix, read_runs, select
from run_folders import record, train, write_metrics


def make_run(folder: Path, config: dict[str, Any], *values: float, **state: Any) -> Path:
    """Return a run folder with a configuration, and a metric eval/val/acc by step."""
    texts = {math.inf: "Infinity", -math.inf: "-Infinity"}
    lines = [
        record(step, **{"eval/val/acc": "NaN" if value != value else texts.get(value, value)})
        for step, value in enumerate(values, start=1)
    ]
    write_metrics(folder, lines)
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "starts").mkdir()
    progress = {"global_step_id": len(values), "epoch_id": 1}
    document = {"state": "completed", "progress": progress, **state}
    (folder / "run_state.json").write_text(json.dumps(document))
    return folder


def optimizer(lr: Any, name: str = "SGD", **more: Any) -> dict[str, Any]:
    return {"optimizer": {"class_type": f"torch.optim:{name}", "lr": lr}, **more}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return a folder with five runs; ``e`` has neither a learning rate nor metrics."""
    folder = tmp_path / "runs"
    for name, config, values, day, state in (
        ("a", optimizer(0.1, model={"hidden": [8, 8]}), (0.5, 0.75, 0.6), 1, "completed"),
        ("b", optimizer(0.01, "AdamW", checkpoint={"folder": None}), (0.9,), 2, "failed"),
        ("c", optimizer("auto", trainer={"max_epoch": 3}), (0.2, math.nan), 3, "completed"),
        ("d", optimizer(1, seed=0), (0.1, -math.inf), 4, "preempted"),
    ):
        make_run(
            folder / name, config, *values, state=state, started_at=f"2026-12-0{day}T23:30:00Z"
        )
    make_run(folder / "e", {"name": "other"}, state="completed")
    return folder


def names(folder: Path, *where: str, **options: Any) -> str:
    """Return the names of the selected runs."""
    return "".join(row["run"] for row in read_runs(folder, where=where, sort="run", **options))


@pytest.mark.parametrize(
    ("condition", "selected"),
    [
        ("optimizer.lr>1e-2", "ad"),
        ("lr>=1e-1", "ad"),
        ("lr = 0.10", "a"),
        ("lr==1", "d"),
        ("lr!=0.1", "bcd"),
        ("lr = auto", "c"),
        ("lr in 0.1, auto", "ac"),
        ("lr in [0.01]", "b"),
        ("optimizer~adam", "b"),
        ("optimizer=SGD", "acd"),
        ("class_type ~ optim.sgd:", "acd"),
        ("hidden=[8, 8]", "a"),
        ("checkpoint.folder=null", "b"),
        ("max_epoch<=3", "c"),
        ("seed=false", ""),
        ("state=failed", "b"),
        ("status!='completed'", "bd"),
        ("status in failed,preempted", "bd"),
        ("steps>1", "acd"),
        ("step < 2", "be"),
        ("epoch=1", "abcde"),
        ("name~oth", "e"),
        ("run=a", "a"),
        ("started<2026-12-03", "ab"),
        ("started<=2026-12-03", "abc"),
        ("started = 2026-12-02", "b"),
        ("started>2026-12-02T23:29", "bcd"),
        ("started>2026-12-02T23:30", "cd"),
        ("eval/val/acc:best>0.7", "ab"),
        ("val/acc:max>0.7", "ab"),
        ("acc:min<=0.2", "cd"),
        ("val/acc>0.55", "ab"),
        ("acc:last=nan", "c"),
        ("acc=-inf", "d"),
        ("acc:last<0", "d"),
    ],
)
def test_a_condition_selects_runs(runs: Path, condition: str, selected: str) -> None:
    """A condition compares state, configuration or a metric, each by its kind of value."""
    assert names(runs, condition) == selected


def test_conditions_are_joined_by_and(runs: Path) -> None:
    """A run meets all conditions."""
    assert names(runs, "lr>=0.01", "acc:best<0.8", "state!=preempted") == "a"
    assert names(runs) == "abcde"


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("lr", "expected FIELD OPERATOR VALUE"),
        ("lr>", "expected FIELD OPERATOR VALUE"),
        ("lr=>1", "expected FIELD OPERATOR VALUE"),
        (">1", "expected FIELD OPERATOR VALUE"),
        ("__import__('os').system('x')", "expected FIELD OPERATOR VALUE"),
        ("optimizer.lrs>1", r"no run has a field 'optimizer.lrs'; did you mean 'optimizer.lr'\?"),
        ("lrr>1", r"did you mean 'lr'\? The fields are run, name, state.* configuration opt.*\.lr"),
        ("val/loss>1", "no run has a field 'val/loss'.*metrics eval/val/acc"),
        ("acc:mean>1", "no run has a field 'acc:mean'"),
        ("started>yesterday", "expected a date such as 2026-12-01"),
        ("lr in [1", "line"),
    ],
)
def test_a_wrong_condition_is_refused(runs: Path, condition: str, message: str) -> None:
    """The error has the expected form, or the fields that exist."""
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        names(runs, condition)


def test_a_short_name_of_several_fields_is_refused(runs: Path) -> None:
    """The error lists the fields of all runs, also if no single run has several."""
    groups = {"optimizer": {"groups": {"head": {"lr": 1.0}}}}
    make_run(runs / "f", groups)
    (runs / "a" / "metrics.jsonl").write_text(record(1, **{"eval/val/acc": 0.5, "acc": 0.1}))
    with pytest.raises(ConfigError, match=r"one of optimizer.groups.head.lr, optimizer.lr"):
        names(runs, "lr>0")
    assert names(runs, "optimizer.lr>=0.1") == "ad"
    assert names(runs, "acc>0") == "a", "a complete name precedes the end of another"
    (runs / "b" / "metrics.jsonl").write_text(record(1, **{"eval/test/acc": 0.5}))
    (runs / "a" / "metrics.jsonl").write_text(record(1, **{"eval/val/acc": 0.5}))
    with pytest.raises(ConfigError, match=r"one of eval/test/acc, eval/val/acc"):
        names(runs, "acc>0")


def test_runs_without_a_field_are_counted(runs: Path) -> None:
    """A run without the field, or with a value of another kind, is excluded and counted."""
    found = select(read_runs_of(runs), ["lr>0", "acc:best<1"])
    assert [run.path for run in found.runs] == ["a", "b", "d"]
    assert found.left_out == [
        "2 of 5 runs left out: no lr to compare with 0",
        "1 of 5 runs left out: no acc:best to compare with 1",
    ]


def test_a_metric_of_unknown_direction_has_no_best(runs: Path) -> None:
    """The error names the choices; a monitor of the run declares the direction."""
    lines = [record(step, speed=value) for step, value in ((1, 3.0), (2, 5.0), (3, 4.0))]
    write_metrics(runs / "a", lines)
    with pytest.raises(ConfigError, match="write speed:min or speed:max"):
        names(runs, "speed:best>4")
    hooks = {"hooks": {"best": {"monitor": "speed", "mode": "max"}}}
    (runs / "a" / "config.yaml").write_text(json.dumps(hooks))
    assert names(runs, "speed:best=5") == "a"


def test_runs_are_sorted_by_any_field(runs: Path) -> None:
    """Unknown values come first, then numbers, then text; the best of a metric is last."""

    def order(sort: str, **options: Any) -> str:
        return "".join(row["run"] for row in read_runs(runs, sort=sort, **options))

    assert order("lr") == "ebadc"
    assert order("lr", reverse=True) == "ecdab"
    assert order("acc:best") == "edcab"
    assert order("started", reverse=True) == "edcba"
    lines = [record(1, **{"eval/val/loss": 0.5})]
    write_metrics(runs / "a", lines)
    write_metrics(runs / "b", [line.replace("0.5", "0.1") for line in lines])
    assert order("loss:best")[-2:] == "ab"
    assert order("loss:min")[-2:] == "ba"


def test_conditions_read_the_runs_of_scripts(tmp_path: Path) -> None:
    """The recorded options of a script's optimizer are fields, as numbers."""
    train(tmp_path / "runs" / "script")
    write_metrics(tmp_path / "runs" / "empty", [])
    found = read_runs(tmp_path / "runs", where="param_groups.0.lr>0", columns=["run", "loss/total"])
    assert [row["run"] for row in found] == ["script"]
    assert isinstance(found[0]["loss/total"], float)


COLUMNS = ["run", "lr", "acc", "changed", "started", "hidden", "trainer.max_epoch"]


def test_values_of_a_column_are_typed(runs: Path) -> None:
    """Numbers stay numbers, null is missing, and a column of several types is text."""
    polars = pytest.importorskip("polars")
    make_run(runs / "f", {"name": "g", "trainer": {"steps": 10**400}})
    frame = read_runs(runs, where="name!=g", sort="run", columns=COLUMNS, frame="polars")
    kinds = [str(kind).partition("(")[0] for kind in frame.schema.values()]
    assert kinds == ["String", "String", "Float64", "Boolean", "Datetime", "String", "Int64"]
    assert frame["lr"].to_list() == ["0.1", "0.01", "auto", "1", None]
    assert repr(frame["acc"].to_list()) == repr([0.6, 0.9, math.nan, -math.inf, None])
    assert frame["hidden"].to_list() == ["[8, 8]", *[None] * 4]
    assert frame["started"].dt.day().to_list() == [1, 2, 3, 4, None]
    large = read_runs(runs, columns=["trainer.steps"], sort="trainer.steps", frame="polars")
    assert large["trainer.steps"].to_list()[-1] == "1" + "0" * 400
    assert read_runs(runs / "a", columns=["steps"], frame="polars").equals(
        polars.DataFrame({"steps": [3]})
    )


def test_a_pandas_frame_of_runs_has_nullable_numbers(runs: Path) -> None:
    """A NaN of a metric is a value, a run without the metric has none."""
    pandas = pytest.importorskip("pandas")
    frame = read_runs(runs, sort="run", columns=COLUMNS, frame="pandas")
    acc = frame["acc"].tolist()
    assert acc[4] is pandas.NA
    assert repr(acc[:4]) == repr([0.6, 0.9, math.nan, -math.inf])
    assert str(frame["trainer.max_epoch"].dtype) == "Int64"
    assert str(frame["started"].dt.tz) == "UTC"
    default = read_runs(runs, frame="pandas")
    assert [*default.columns][:4] == ["run", "state", "steps", "epochs"]
    assert len(default) == 5


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_no_runs_are_an_empty_frame(tmp_path: Path, kind: Literal["pandas", "polars"]) -> None:
    """A folder without runs has the columns and no rows; a missing folder is an error."""
    pytest.importorskip(kind)
    frame = read_runs(tmp_path, where="lr>1", columns=["run", "lr"], frame=kind)
    assert ([*frame.columns], len(frame)) == (["run", "lr"], 0)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_runs(tmp_path / "none")


def test_files_have_the_same_rows(runs: Path, tmp_path: Path) -> None:
    """CSV, JSON lines and Parquet have a row for each run, with missing and non-finite values."""
    parquet = pytest.importorskip("pyarrow.parquet")
    make_run(runs / '=1+2,\n"x"', optimizer(2))
    found = select(read_runs_of(runs), columns=COLUMNS, sort="run")
    for suffix in (".csv", ".jsonl", ".parquet"):
        found.write(tmp_path / f"runs{suffix}")
    with (tmp_path / "runs.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["run"] for row in rows] == ['=1+2,\n"x"', *"abcde"]
    assert [row["acc"] for row in rows] == ["", "0.6", "0.9", "nan", "-inf", ""]
    assert [row["hidden"] for row in rows][:2] == ["", "[8, 8]"]
    assert rows[1]["started"] == "2026-12-01T23:30:00+00:00"
    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [line["acc"] for line in lines] == [None, 0.6, 0.9, "NaN", "-Infinity", None]
    assert [line["lr"] for line in lines] == [2, 0.1, 0.01, "auto", 1, None]
    table = parquet.read_table(tmp_path / "runs.parquet").to_pydict()
    assert repr(table["acc"]) == repr([None, 0.6, 0.9, math.nan, -math.inf, None])
    assert table["trainer.max_epoch"] == [None, None, None, 3, None, None]
    with pytest.raises(ConfigError, match=r"expected a file ending in \.csv, \.jsonl or \.parquet"):
        check_suffix(tmp_path / "runs.xlsx")
