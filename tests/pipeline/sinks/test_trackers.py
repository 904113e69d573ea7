"""Experiment trackers, each with its own package where it is installed."""

from __future__ import annotations

import importlib
import logging
import math
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from robo_orchard_lab.pipeline import PipelineHookArgs
from robo_orchard_lab.pipeline.context import PipelineRun
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue
from robo_orchard_lab.pipeline.sinks import TrackerSink, TrackerSinkConfig

RECORDS = (
    MetricsRecord(0, 50, 50, (MetricValue("eval/val/acc", 0.5, 45), MetricValue("loss", 2.0, 50))),
    MetricsRecord(0, 100, 100, (MetricValue("loss", 1.0, 100),)),
)
POINTS = {"loss": [(50, 2.0), (100, 1.0)], "eval/val/acc": [(45, 0.5)]}


def at(step: int, accelerator: Accelerator | None = None) -> PipelineHookArgs:
    run = PipelineRun.standalone(accelerator=accelerator or Accelerator(cpu=True))
    run.progress.global_step_id = step
    return PipelineHookArgs(run)


def log(sink: TrackerSink, args: PipelineHookArgs, *records: MetricsRecord) -> None:
    sink.open(args)
    for record in records:
        sink.write(record)
    sink.close()


class ListTracker(GeneralTracker):  # type: ignore[misc]  # accelerate ships no type information
    """Keeps what it is told, and fails at one step."""

    requires_logging_directory = False

    def __init__(self, name: str = "list", fails_at: int | None = None) -> None:
        self.name = name  # type: ignore[misc,unused-ignore]  # untyped without accelerate's types
        super().__init__()
        self.fails_at = fails_at
        self.told: list[Any] = []

    @property
    def tracker(self) -> list[Any]:
        return self.told

    def start(self) -> None:
        self.told.append("start")

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        self.told.append(dict(values))

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step == self.fails_at:
            raise OSError(28, "No space left on device")
        self.told.append((step, dict(values)))

    def finish(self) -> None:
        self.told.append("finish")


def test_each_step_is_one_call() -> None:
    """Values go to the step that they belong to, between one start and one finish."""
    tracker = ListTracker()
    log(TrackerSink([tracker], hyperparameters={"rate": 0.1}), at(0), *RECORDS)
    assert tracker.told == [
        "start",
        {"rate": 0.1},
        (45, {"eval/val/acc": 0.5}),
        (50, {"loss": 2.0}),
        (100, {"loss": 1.0}),
        "finish",
    ]


def test_one_that_fails_does_not_take_others_along(caplog: pytest.LogCaptureFixture) -> None:
    """It is reported once, by its name with the error, and the others get every record."""
    full, other = ListTracker("full", fails_at=50), ListTracker()
    third = MetricsRecord(0, 150, 150, (MetricValue("loss", 0.5, 150),))
    log(TrackerSink([full, other]), at(0), *RECORDS, third)
    assert full.told == ["start", (45, {"eval/val/acc": 0.5}), "finish"]
    assert [told[0] for told in other.told[1:-1]] == [45, 50, 100, 150]
    (report,) = caplog.records
    assert report.levelno == logging.ERROR
    assert report.getMessage() == (
        "TrackerSink drops 'full', which failed with OSError: [Errno 28] No space left on device; "
        "training continues without it"
    )


def test_one_that_can_not_start_is_an_error() -> None:
    """The error names the tracker, and what was started is finished."""

    class Broken(ListTracker):
        def start(self) -> None:
            raise ConnectionError("no network")

    tracker = ListTracker()
    with pytest.raises(ConnectionError, match="no network") as caught:
        TrackerSink([tracker, Broken("broken")]).open(at(0))
    assert caught.value.__notes__ == ["TrackerSink could not open 'broken'"]
    assert tracker.told == ["start", "finish"]


def test_the_accelerators_trackers_are_used_when_none_are_named() -> None:
    """Those that it was made with are started and finished."""
    tracker = ListTracker()
    log(TrackerSink(), at(0, Accelerator(cpu=True, log_with=tracker)), *RECORDS)
    assert (tracker.told[0], tracker.told[-1]) == ("start", "finish")
    assert len(tracker.told) == 5


def test_trackers_that_are_started_stay_their_owners() -> None:
    """What ``init_trackers`` has started is logged to, and neither started again nor finished."""
    tracker = ListTracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("mine")
    log(TrackerSink(), at(0, accelerator), *RECORDS)
    accelerator.log({"mine": 1.0}, step=101)
    accelerator.end_training()
    assert [told if isinstance(told, str) else told[0] for told in tracker.told] == [
        *("start", 45, 50, 100),
        *(101, "finish"),
    ]


def test_without_any_tracker_it_is_an_error() -> None:
    """The error says where to name some."""
    with pytest.raises(PipelineConfigError, match=r"is empty, .* pass trackers=\['tensorboard'\]"):
        TrackerSink().open(at(0))


def test_an_unknown_tracker_is_refused_when_it_is_built() -> None:
    """The error lists those that there are."""
    with pytest.raises(PipelineConfigError, match=r"no tracker 'tensorbord'; it has .*tensorboard"):
        TrackerSinkConfig(trackers=["tensorbord"])()


def test_a_missing_package_is_named_when_it_is_built() -> None:
    """The error gives the command that installs it."""
    assert "clearml" not in sys.modules
    with pytest.raises(PipelineConfigError, match=r"'clearml', whose .*: pip install clearml"):
        TrackerSinkConfig(trackers=["clearml"])()


def test_options_for_another_tracker_are_refused() -> None:
    """A misspelled name among the options is an error when the sink is built."""
    with pytest.raises(
        PipelineConfigError, match=r"options has wandb, which is not in trackers=\['list"
    ):
        TrackerSink([ListTracker()], options={"wandb": {"mode": "offline"}})


def test_its_configuration_survives_a_file() -> None:
    """Numbers, flags and texts keep their types."""
    config = TrackerSinkConfig(
        trackers=["wandb"],
        hyperparameters={"rate": 0.1, "layers": 4, "bias": True, "name": "1"},
        options={"wandb": {"mode": "offline", "tags": ["a", "b"]}},
    )
    for form in ("json", "yaml", "toml"):
        assert TrackerSinkConfig.from_str(config.to_str(form), form) == config


class TestTensorBoard:
    """What is in the event files, as TensorBoard reads them."""

    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("tensorboard")

    def points(self, folder: Path) -> dict[str, list[tuple[int, float]]]:
        event_accumulator: Any = importlib.import_module(
            "tensorboard.backend.event_processing.event_accumulator"
        )
        read = event_accumulator.EventAccumulator(str(folder))
        read.Reload()
        tags = {tag: read.Scalars(tag) for tag in read.Tags()["scalars"]}
        return {tag: [(e.step, e.value) for e in events] for tag, events in tags.items() if events}

    def test_tags_and_steps_are_read_back(self, tmp_path: Path) -> None:
        """Each tag has the values at the steps that they belong to."""
        log(TrackerSink(["tensorboard"], folder=tmp_path), at(0), *RECORDS)
        assert self.points(tmp_path / "training") == POINTS

    def test_what_is_no_number_is_kept(self, tmp_path: Path) -> None:
        """NaN and infinity arrive as such."""
        values = (MetricValue("a", math.nan, 1), MetricValue("b", -math.inf, 1))
        log(TrackerSink(["tensorboard"], folder=tmp_path), at(0), MetricsRecord(0, 1, 1, values))
        assert str(self.points(tmp_path / "training")) == "{'a': [(1, nan)], 'b': [(1, -inf)]}"

    def test_a_resumed_run_hides_what_it_does_again(self, tmp_path: Path) -> None:
        """Values from after the step that a run goes on from are not shown twice."""
        log(TrackerSink(["tensorboard"], folder=tmp_path), at(0), *RECORDS)
        again = MetricsRecord(0, 100, 100, (MetricValue("loss", 1.5, 100),))
        log(TrackerSink(["tensorboard"], folder=tmp_path), at(50), again)
        assert self.points(tmp_path / "training") == {**POINTS, "loss": [(50, 2.0), (100, 1.5)]}
        log(TrackerSink(["tensorboard"], folder=tmp_path), at(0), RECORDS[1])
        assert self.points(tmp_path / "training") == {"loss": [(100, 1.0)]}

    def test_hyperparameters_are_stored_once(self, tmp_path: Path) -> None:
        """They are in a run of their own, as TensorBoard has it, and a resume adds no other."""
        sink = TrackerSink(
            ["tensorboard"], "mine", tmp_path, {"rate": 0.1, "bias": True, "name": "x"}
        )
        log(sink, at(0), *RECORDS)
        log(sink, at(50), *RECORDS[1:])
        assert len([*tmp_path.glob("mine/*/hparams.yml")]) == 1

    def test_the_accelerators_folder_is_the_default(self, tmp_path: Path) -> None:
        """With ``log_with`` and ``project_dir`` alone, files go where Accelerate puts them."""
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
        log(TrackerSink(project="mine"), at(0, accelerator), *RECORDS)
        assert self.points(tmp_path / "mine") == POINTS


@pytest.mark.filterwarnings("default")  # its own, and those of what it imports
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An offline run has the values at their steps in its file."""
    pytest.importorskip("wandb")
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"wandb": {"mode": "offline"}}
    log(TrackerSink(["wandb"], folder=tmp_path, options=options), at(0), *RECORDS)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    points: dict[str, list[tuple[int, float]]] = {}
    for data in leveldb_log(file.read_bytes()):
        history = messages.Record.FromString(data).history
        for item in history.item:
            name = item.key or "/".join(item.nested_key)
            if not name.startswith("_"):
                points.setdefault(name, []).append((history.step.num, float(item.value_json)))
    assert points == POINTS


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """The records of the format that W&B's files have, behind 7 bytes of their own."""
    record, position = b"", 7
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)  # behind a checksum
        position += 7
        record += data[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.filterwarnings("default")  # its own, and those of what it imports
def test_mlflow_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of the experiment has the values at their steps in the folder's database."""
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # put back afterwards
    log(TrackerSink(["mlflow"], "mine", tmp_path, {"rate": 0.1}), at(0), *RECORDS)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mine")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"rate": "0.1"}
    assert experiment.artifact_location == (tmp_path / "mlflow").as_uri()
    for name, points in POINTS.items():
        found = client.get_metric_history(run.info.run_id, name)
        assert [(metric.step, metric.value) for metric in found] == points
    mlflow.set_tracking_uri(None)


@pytest.mark.filterwarnings("default")  # its own, and those of what it imports
def test_trackio_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of the project has the values at their steps in its database."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # looked at when it is imported
    pytest.importorskip("trackio")
    storage: Any = importlib.import_module("trackio.sqlite_storage")
    options = {"trackio": {"name": "first", "auto_log_cpu": False, "auto_log_gpu": False}}
    log(TrackerSink(["trackio"], "mine", options=options), at(0), *RECORDS)
    rows = storage.SQLiteStorage.get_logs("mine", "first")
    points = {name: [(row["step"], row[name]) for row in rows if name in row] for name in POINTS}
    assert points == POINTS
