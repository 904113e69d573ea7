"""Experiment trackers; each needs its package installed."""

from __future__ import annotations

import importlib
import logging
import math
import resource
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from robo_orchard_lab.pipeline import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.metrics import MetricsRecord, MetricValue
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
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
    """Tracker that records its calls, and fails at one step."""

    requires_logging_directory = False

    def __init__(self, name: str = "list", fails_at: int | None = None) -> None:
        self.name = name  # type: ignore[misc,unused-ignore]  # untyped without accelerate's types
        super().__init__()
        self.fails_at = fails_at
        self.calls: list[Any] = []

    @property
    def tracker(self) -> list[Any]:
        return self.calls

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        self.calls.append(dict(values))

    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        if step == self.fails_at:
            raise OSError(28, "No space left on device")
        self.calls.append((step, dict(values)))

    def finish(self) -> None:
        self.calls.append("finish")


def test_each_step_is_one_call() -> None:
    """Values are logged at their step, between one start and one finish."""
    tracker = ListTracker()
    log(TrackerSink([tracker], hyperparameters={"rate": 0.1}), at(0), *RECORDS)
    assert tracker.calls == [
        "start",
        {"rate": 0.1},
        (45, {"eval/val/acc": 0.5}),
        (50, {"loss": 2.0}),
        (100, {"loss": 1.0}),
        "finish",
    ]


def test_failing_tracker_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """The error is logged once with the tracker's name, the lost records at the end; the others
    get every record."""
    full, other = ListTracker("full", fails_at=50), ListTracker()
    third = MetricsRecord(0, 150, 150, (MetricValue("loss", 0.5, 150),))
    log(TrackerSink([full, other]), at(0), *RECORDS, third)
    assert full.calls == ["start", (45, {"eval/val/acc": 0.5}), "finish"]
    assert [call[0] for call in other.calls[1:-1]] == [45, 50, 100, 150]
    assert {report.levelno for report in caplog.records} == {logging.ERROR}
    assert [report.getMessage() for report in caplog.records] == [
        "TrackerSink: writing 'full' failed; the run continues, and writes the records later: "
        "OSError: [Errno 28] No space left on device",
        "TrackerSink: 3 records of steps 50 to 150 were not written: 'full'",
    ]


def test_tracker_is_complete_when_there_is_room(caplog: pytest.LogCaptureFixture) -> None:
    """Each step is logged once, in order, when a tracker works again."""
    tracker = ListTracker("full", fails_at=50)
    sink = TrackerSink([tracker])
    sink.open(at(0))
    for record in RECORDS:
        sink.write(record)
    tracker.fails_at = None
    sink.write(MetricsRecord(0, 150, 150, (MetricValue("loss", 0.5, 150),)))
    sink.close()
    assert [call[0] for call in tracker.calls[1:-1]] == [45, 50, 100, 150]
    assert "TrackerSink: 'full' is written, after 2 failed attempts" in caplog.text


def test_tracker_with_another_error_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """A tracker that fails for another reason than writing gets no more records."""

    class Broken(ListTracker):
        def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
            raise TypeError("no numbers")

    tracker = Broken("broken")
    log(TrackerSink([tracker]), at(0), *RECORDS)
    assert tracker.calls == ["start", "finish"]
    assert [report.getMessage() for report in caplog.records] == [
        "TrackerSink drops 'broken', which failed with TypeError: no numbers; training continues "
        "without it"
    ]


def test_start_failure_is_an_error() -> None:
    """The error names the tracker, and started trackers are finished."""

    class Broken(ListTracker):
        def start(self) -> None:
            raise ConnectionError("no network")

    tracker = ListTracker()
    with pytest.raises(ConnectionError, match="no network") as caught:
        TrackerSink([tracker, Broken("broken")]).open(at(0))
    assert caught.value.__notes__ == ["TrackerSink could not open 'broken'"]
    assert tracker.calls == ["start", "finish"]


def test_accelerator_trackers_are_the_default() -> None:
    """Trackers of the Accelerator are started and finished."""
    tracker = ListTracker()
    log(TrackerSink(), at(0, Accelerator(cpu=True, log_with=tracker)), *RECORDS)
    assert (tracker.calls[0], tracker.calls[-1]) == ("start", "finish")
    assert len(tracker.calls) == 5


def test_started_trackers_are_only_logged_to() -> None:
    """Trackers started by ``init_trackers`` are neither started again nor finished."""
    tracker = ListTracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("mine")
    log(TrackerSink(), at(0, accelerator), *RECORDS)
    accelerator.log({"mine": 1.0}, step=101)
    accelerator.end_training()
    assert [call if isinstance(call, str) else call[0] for call in tracker.calls] == [
        *("start", 45, 50, 100),
        *(101, "finish"),
    ]


def test_missing_trackers_are_refused() -> None:
    """The error says where to name trackers."""
    with pytest.raises(PipelineConfigError, match=r"is empty, .* pass trackers=\['tensorboard'\]"):
        TrackerSink().open(at(0))


def test_unknown_tracker_is_refused() -> None:
    """The error lists the known trackers."""
    with pytest.raises(PipelineConfigError, match=r"no tracker 'tensorbord'; it has .*tensorboard"):
        TrackerSinkConfig(trackers=["tensorbord"])()


def test_missing_package_is_refused() -> None:
    """The error has the install command."""
    assert "clearml" not in sys.modules
    with pytest.raises(PipelineConfigError, match=r"'clearml', whose .*: pip install clearml"):
        TrackerSinkConfig(trackers=["clearml"])()


def test_options_of_unlisted_tracker_are_refused() -> None:
    """A misspelled tracker name among the options is an error at construction."""
    with pytest.raises(
        PipelineConfigError, match=r"options has wandb, which is not in trackers=\['list"
    ):
        TrackerSink([ListTracker()], options={"wandb": {"mode": "offline"}})


def test_config_round_trips() -> None:
    """Numbers, booleans and strings keep their types in all formats."""
    config = TrackerSinkConfig(
        trackers=["wandb"],
        hyperparameters={"rate": 0.1, "layers": 4, "bias": True, "name": "1"},
        options={"wandb": {"mode": "offline", "tags": ["a", "b"]}},
    )
    for form in ("json", "yaml", "toml"):
        assert TrackerSinkConfig.from_str(config.to_str(form), form) == config


class TestTensorBoard:
    """Contents of event files, read by TensorBoard."""

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
        """Each tag has its values at their steps."""
        log(TrackerSink(["tensorboard"], folder=tmp_path), at(0), *RECORDS)
        assert self.points(tmp_path / "training") == POINTS

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_file_is_complete_when_there_is_room(self, tmp_path: Path) -> None:
        """Values of a full disk, and of a removed folder, are written when there is room."""
        # TensorBoard numbers the writers of a process, and reads files of one second in order of
        # their names, 10 before 9: begin past that.
        writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        for _ in range(10):
            writer(str(tmp_path / "other")).close()
        sink = TrackerSink(["tensorboard"], folder=tmp_path)
        sink.open(at(0))
        points = [(step, float(step)) for step in range(10, 70, 10)]
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            for step, value in points:
                largest_file = 100 if 30 <= step < 60 else before[0]
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, before[1]))
                sink.write(MetricsRecord(0, step, step, (MetricValue("loss", value, step),)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert self.points(tmp_path / "training") == {"loss": points}
        shutil.rmtree(tmp_path / "training")
        sink.write(MetricsRecord(0, 70, 70, (MetricValue("loss", 70.0, 70),)))
        sink.close()
        assert self.points(tmp_path / "training") == {"loss": [(70, 70.0)]}

    def test_non_finite_values_are_kept(self, tmp_path: Path) -> None:
        """NaN and inf are logged as such."""
        values = (MetricValue("a", math.nan, 1), MetricValue("b", -math.inf, 1))
        log(TrackerSink(["tensorboard"], folder=tmp_path), at(0), MetricsRecord(0, 1, 1, values))
        assert str(self.points(tmp_path / "training")) == "{'a': [(1, nan)], 'b': [(1, -inf)]}"

    def test_resume_hides_later_values(self, tmp_path: Path) -> None:
        """Values after the resumed step are not shown twice."""
        log(TrackerSink(["tensorboard"], folder=tmp_path), at(0), *RECORDS)
        again = MetricsRecord(0, 100, 100, (MetricValue("loss", 1.5, 100),))
        log(TrackerSink(["tensorboard"], folder=tmp_path), at(50), again)
        assert self.points(tmp_path / "training") == {**POINTS, "loss": [(50, 2.0), (100, 1.5)]}
        log(TrackerSink(["tensorboard"], folder=tmp_path), at(0), RECORDS[1])
        assert self.points(tmp_path / "training") == {"loss": [(100, 1.0)]}

    def test_hyperparameters_are_stored_once(self, tmp_path: Path) -> None:
        """TensorBoard keeps them in a separate run; a resume adds no other."""
        sink = TrackerSink(
            ["tensorboard"], "mine", tmp_path, {"rate": 0.1, "bias": True, "name": "x"}
        )
        log(sink, at(0), *RECORDS)
        log(sink, at(50), *RECORDS[1:])
        assert len([*tmp_path.glob("mine/*/hparams.yml")]) == 1

    def test_accelerator_folder_is_the_default(self, tmp_path: Path) -> None:
        """Files go to Accelerate's folder if only ``log_with`` and ``project_dir`` are set."""
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
        log(TrackerSink(project="mine"), at(0, accelerator), *RECORDS)
        assert self.points(tmp_path / "mine") == POINTS


@pytest.mark.filterwarnings("default")  # warnings of the package and its imports
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of an offline run has the values at their steps."""
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
    """Iterate over the records of a W&B file: a LevelDB log after 7 header bytes."""
    record, position = b"", 7
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)  # after a checksum
        position += 7
        record += data[position : position + length]
        position += length
        if kind in (1, 4):  # complete, or the last part
            yield record
            record = b""


@pytest.mark.filterwarnings("default")  # warnings of the package and its imports
def test_mlflow_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's database has the values at their steps."""
    mlflow: Any = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # restored afterwards
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


@pytest.mark.filterwarnings("default")  # warnings of the package and its imports
def test_trackio_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project's database has the values at their steps."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read at import
    pytest.importorskip("trackio")
    storage: Any = importlib.import_module("trackio.sqlite_storage")
    options = {"trackio": {"name": "first", "auto_log_cpu": False, "auto_log_gpu": False}}
    log(TrackerSink(["trackio"], "mine", options=options), at(0), *RECORDS)
    rows = storage.SQLiteStorage.get_logs("mine", "first")
    points = {name: [(row["step"], row[name]) for row in rows if name in row] for name in POINTS}
    assert points == POINTS
