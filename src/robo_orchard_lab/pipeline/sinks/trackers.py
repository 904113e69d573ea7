"""Sink to experiment trackers, through Accelerate."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
from accelerate.tracking import (
    LOGGER_TYPE_TO_CLASS,
    GeneralTracker,
    TensorBoardTracker,
    get_available_trackers,
)
from pydantic import Field, field_validator

from robo_orchard_core.utils.config.errors import describe
from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_core.utils.untrusted_text import path_problem
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.media import Hyperparameter, Media, Table
from robo_orchard_lab.pipeline.metrics import MetricsRecord
from robo_orchard_lab.pipeline.pixels import MediaError
from robo_orchard_lab.pipeline.run.durable import temporary_name, write_file
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.sinks.sink import MetricsSink, SinkConfig, SinkGroup

TrackerLike: TypeAlias = str | GeneralTracker

_TENSORBOARD_OPTIONS = ("filename_suffix", "flush_secs", "max_queue", "purge_step")
_PACKAGES = {"comet_ml": "comet-ml"}
"""Package names of trackers whose package has another name."""
_ROOM_BYTES = 1 << 16
_MAX_FRAMES = 64


class TrackerSink:
    """Sink to TensorBoard, W&B, MLflow, Trackio or another tracker of Accelerate.

    Each value is logged at its step, in one call per step. A tracker that fails during the run is
    logged once, and handled as a failing sink, see :class:`MetricsSink`.

    Files of the trackers:

    - ``tensorboard``: ``folder/project``. A resumed run makes TensorBoard hide the values of later
      steps; so does a new run in the same folder.
    - ``mlflow``: runs in ``folder/mlflow.db`` and artifacts in ``folder/mlflow``; without
      ``folder``, at ``MLFLOW_TRACKING_URI``. A resumed run is a new MLflow run, unless
      ``options={"mlflow": {"run_id": ...}}`` names an existing one.
    - ``wandb``: ``folder/wandb``. W&B requires an account, or
      ``options={"wandb": {"mode": "offline"}}``. To resume a W&B run, pass its ``id`` and
      ``"resume": "allow"``; W&B rejects values of steps that it already has.
    - ``trackio``: the environment variable ``TRACKIO_DIR`` at the first import.

    Args:
        trackers: names or live trackers; by default the trackers of the Accelerator
            (``log_with=...``). Trackers started by ``accelerator.init_trackers`` are only logged
            to; others are started here and finished at the end of the run.
        project: W&B and Trackio project, MLflow experiment and TensorBoard folder.
        folder: folder for files; by default the Accelerator's ``logging_dir``, or ``runs``.
        hyperparameters: hyperparameters of the run, logged at its start, in addition to those of
            its experiment file.
        options: further constructor arguments by tracker name.

    Raises:
        PipelineConfigError: a tracker is unknown, or its package is not installed.
    """

    def __init__(
        self,
        trackers: Sequence[TrackerLike] = (),
        project: str = "training",
        folder: str | os.PathLike[str] | None = None,
        hyperparameters: Mapping[str, Hyperparameter] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._trackers = list(trackers)
        self._project = project
        self._folder = None if folder is None else Path(folder)
        self._hyperparameters = dict(hyperparameters or {})
        self._options = {name: dict(given) for name, given in (options or {}).items()}
        self.group: SinkGroup | None = None
        """Open trackers."""
        self._known: list[RemovableHandle] = []
        self.reports_as = type(self).__name__
        """Name in reports."""
        for tracker in self._trackers:
            if isinstance(tracker, str):
                _check_installed(tracker)
        unknown = {*self._options} - {_name(tracker) for tracker in self._trackers}
        if self._trackers and unknown:
            raise PipelineConfigError(
                f"TrackerSink.options has {', '.join(sorted(unknown))}, which is not in trackers="
                f"{[_name(tracker) for tracker in self._trackers]}"
            )

    def open(self, args: PipelineHookArgs) -> None:
        """Start the trackers.

        Raises:
            PipelineConfigError: neither the sink nor the Accelerator has a tracker.
            Exception: error of a tracker that can't start.
        """
        sinks: dict[str, MetricsSink] = {}
        for tracker in self._trackers or _accelerator_trackers(args.accelerator):
            live = self._make(tracker, args) if isinstance(tracker, str) else tracker
            is_started = any(live is known for known in args.accelerator.trackers)
            given = {**args.report.hyperparameters, **self._hyperparameters}
            sinks[_name(tracker)] = _OneTracker(live, is_started, given)
            self._known.append(args.report.attach_tracker(_name(tracker), live))
        self.group = SinkGroup(sinks, self.reports_as)
        self.group.open(args)

    def write(self, record: MetricsRecord) -> None:
        assert self.group is not None, "open() comes first"
        self.group.write(record)

    def close(self) -> None:
        """Finish the trackers started by this sink."""
        while self._known:
            self._known.pop().remove()
        group, self.group = self.group, None
        if group is not None:
            group.close()

    def _make(self, name: str, args: PipelineHookArgs) -> GeneralTracker:
        """Return a tracker without starting."""
        accelerator, options = args.accelerator, self._options.get(name, {})
        if name == "mlflow" and self._folder is not None:
            mlflow = importlib.import_module("mlflow")  # mypy lacks its types if not installed
            self._folder.mkdir(parents=True, exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{self._folder.absolute() / 'mlflow.db'}")
            options = {"logging_dir": (self._folder / "mlflow").absolute().as_uri(), **options}
        if name == "wandb" and self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)  # W&B falls back to a temporary folder
            options = {"dir": str(self._folder), **options}
        if name == "tensorboard":
            done = args.progress.global_step_id
            options = {"purge_step": done + 1 if done else 0, **options}
        cls = LOGGER_TYPE_TO_CLASS[name]
        if cls.requires_logging_directory:
            folder = self._folder or accelerator.logging_dir or "runs"
            return cls(self._project, os.fspath(folder), **options)
        return cls(self._project, **options)


class TrackerSinkConfig(SinkConfig[TrackerSink]):
    """Configuration of a :class:`TrackerSink`.

    >>> TrackerSinkConfig(options={"wandb": {"mode": "offline"}}).trackers
    []
    """

    class_type: type[TrackerSink] = TrackerSink
    trackers: list[str] = Field(
        default=[],
        description="Names of trackers, such as 'tensorboard', 'wandb', 'mlflow' or 'trackio'; "
        "default: the trackers of the Accelerator.",
    )
    project: Annotated[str, RunPath(joined=False)] = Field(
        default="training", min_length=1, description="Project or experiment in each tracker."
    )
    folder: Annotated[str | None, RunPath()] = Field(
        default=None,
        min_length=1,
        description="Folder for the files of trackers; default: the Accelerator's logging_dir, or "
        "'runs'.",
    )
    hyperparameters: dict[str, Hyperparameter] = Field(
        default={}, description="Hyperparameters of the run, logged at its start."
    )
    options: dict[str, dict[str, Any]] = Field(
        default={}, description="Further constructor arguments by tracker name."
    )

    @field_validator("options")
    @classmethod
    def _stay_in_the_folder(cls, options: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Refuse options by which TensorBoard, which needs no trust, writes somewhere else."""
        for name, value in options.get("tensorboard", {}).items():
            if name not in _TENSORBOARD_OPTIONS:
                known = ", ".join(_TENSORBOARD_OPTIONS)
                raise ValueError(f"tensorboard.{name} is not an option; expected {known}")
            if name != "filename_suffix":
                continue
            if not isinstance(value, str) or "/" in value or path_problem(value or "a"):
                raise ValueError(
                    f"tensorboard.{name}: expected the end of a file's name, such as '.a', found "
                    f"{describe(value)}"
                )
        return options


class _OneTracker:
    """Sink to a tracker; starts and finishes the tracker unless started elsewhere."""

    def __init__(
        self,
        tracker: GeneralTracker,
        is_started: bool,
        hyperparameters: Mapping[str, Hyperparameter],
    ) -> None:
        self._tracker = tracker
        self._is_started = is_started
        self._hyperparameters = dict(hyperparameters)
        self._record: MetricsRecord | None = None
        self._steps: list[tuple[int, dict[str, float]]] = []  # of the record, not logged yet
        self._has_failed = False
        self._media: list[Media] = []  # not logged yet
        self._drop: Callable[[str, object], None] = lambda name, problem: None

    def open(self, args: PipelineHookArgs) -> None:
        self._drop = args.report.drop
        if not self._is_started:
            self._tracker.start()
        # TensorBoard writes hyperparameters to a separate run, one more after each resume.
        is_repeated = self._tracker.name == "tensorboard" and args.progress.global_step_id > 0
        if self._hyperparameters and not is_repeated:
            self._tracker.store_init_configuration(self._hyperparameters)

    def write(self, record: MetricsRecord) -> None:
        if record is not self._record:
            self._record, self._steps = record, [*record.by_step().items()]
        if isinstance(self._tracker, TensorBoardTracker) and self._steps:
            self._restart_writer(self._steps[0][0])
        self._has_failed = True  # until the end
        while self._steps:
            step, values = self._steps[0]
            self._log_media(step)
            self._tracker.log(values, step=step)
            del self._steps[0]
        self._has_failed = False
        self._log_media(record.global_step_id)

    def write_media(self, media: Media) -> None:
        """Log media: at once in TensorBoard, else with the metrics of the next logging point.

        W&B accepts no values of an earlier step than it has, such as of metrics logged later.

        Raises:
            MediaError: the tracker has no method for the kind.
        """
        method = {"image": "log_images", "video": "log_images", "table": "log_table"}
        name = str(self._tracker.name)
        if media.kind == "hyperparameters" or isinstance(self._tracker, TensorBoardTracker):
            self._log(media)
        elif hasattr(self._tracker, method.get(media.kind, "")):
            self._media.append(media)
        else:
            raise MediaError(
                f"Accelerate's tracker {name} has no method for {media.kind}s; use "
                f"args.report.tracker({name!r}), or read the run folder's media/"
            )

    def _log_media(self, step: float) -> None:
        """Log the media up to a step; a failure is reported, and the metrics continue."""
        while self._media and self._media[0].step <= step:
            media = self._media.pop(0)
            try:
                self._log(media)
            except Exception as error:  # a lost image must not end the run
                self._drop(f"{media.name} by {self._tracker.name}", error)

    def _log(self, media: Media) -> None:
        tracker, name, step = self._tracker, media.name, media.step
        if media.kind == "hyperparameters":
            if not (tracker.name == "tensorboard" and step > 0):  # as in open()
                tracker.store_init_configuration(media.content)
        elif isinstance(tracker, TensorBoardTracker):
            writer = tracker.tracker
            if media.kind in ("image", "video"):
                # A video as the grid of its first frames: its writer needs moviepy.
                frames = media.content if media.kind == "video" else media.content[None]
                frames = _with_colors(frames[:_MAX_FRAMES])
                writer.add_images(name, frames, step, dataformats="NHWC")
            else:
                writer.add_text(name, _markdown(media), step)
            if media.caption:
                writer.add_text(f"{name}/caption", media.caption, step)
        elif media.kind in ("image", "video"):
            frames = media.content if media.kind == "video" else media.content[None]
            tracker.log_images({name: [*_with_colors(frames[:_MAX_FRAMES])]}, step=step)
        else:
            rows = [[*row] for row in media.content.rows]
            tracker.log_table(name, columns=[*media.content.columns], data=rows, step=step)

    def _restart_writer(self, step: int) -> None:
        """Replace TensorBoard's writer, which a full disk has ended, or whose folder is removed.

        TensorBoard hides the values of the old writer from ``step`` on.
        """
        tracker, folder = self._tracker, Path(self._tracker.logging_dir)
        if folder.is_dir() and not self._has_failed:
            return
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / temporary_name("room")
        try:
            write_file(probe, bytes(_ROOM_BYTES))  # a writer that can't start leaves a thread
        finally:
            probe.unlink(missing_ok=True)
        with suppress(OSError):
            tracker.finish()
        tracker.init_kwargs["purge_step"] = step
        tracker.start()

    def close(self) -> None:
        self._log_media(math.inf)
        if not self._is_started:
            self._tracker.finish()


def _with_colors(frames: Any) -> Any:
    return np.repeat(frames, 3, axis=-1) if frames.shape[-1] == 1 else frames


def _markdown(media: Media) -> str:
    if not isinstance(media.content, Table):
        return str(media.content)
    columns, rows = media.content.columns, media.content.rows
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _accelerator_trackers(accelerator: Any) -> Sequence[TrackerLike]:
    """Return the started trackers of the Accelerator, or else the trackers of ``log_with``."""
    trackers = accelerator.trackers or accelerator.log_with
    if not trackers:
        raise PipelineConfigError(
            "TrackerSink.trackers is empty, and the Accelerator has no trackers; pass "
            "trackers=['tensorboard'], or Accelerator(log_with='tensorboard', project_dir=...)"
        )
    return [t if isinstance(t, GeneralTracker) else str(t) for t in trackers]


def _check_installed(name: str) -> None:
    if name not in LOGGER_TYPE_TO_CLASS:
        raise PipelineConfigError(
            f"TrackerSink.trackers: Accelerate has no tracker {name!r}; it has "
            f"{', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
        )
    cls = LOGGER_TYPE_TO_CLASS[name]
    if cls.__module__ == "accelerate.tracking" and name not in map(str, get_available_trackers()):
        raise PipelineConfigError(
            f"TrackerSink.trackers names {name!r}, whose package is not installed: "
            f"pip install {_PACKAGES.get(name, name)}"
        )


def _name(tracker: TrackerLike) -> str:
    return tracker if isinstance(tracker, str) else str(tracker.name)
