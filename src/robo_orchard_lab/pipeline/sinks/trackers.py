"""Send metrics to experiment trackers, through Accelerate."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from pydantic import Field

from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.metrics import MetricsRecord
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.sinks.sink import MetricsSink, SinkConfig, SinkGroup

Hyperparameter: TypeAlias = bool | int | float | str
TrackerLike: TypeAlias = str | GeneralTracker

_PACKAGES = {"comet_ml": "comet-ml"}
"""What pip calls a tracker's package, where it is not the tracker's name."""


class TrackerSink:
    """Logs to TensorBoard, W&B, MLflow, Trackio and whatever else Accelerate has a tracker for.

    Each value is logged at the step that it belongs to, in one call for each step. A tracker that
    fails while the run goes on is reported once and dropped; the others go on.

    Where the files of a tracker are, if it writes some:

    - ``tensorboard``: in ``folder/project``. A run that goes on from step n, or begins anew, has
      TensorBoard hide what is there already from later steps.
    - ``mlflow``: with a ``folder``, runs in ``folder/mlflow.db`` and artifacts in
      ``folder/mlflow``; without, where MLflow is set up to (``MLFLOW_TRACKING_URI``). A resumed
      run is another one, unless ``options={"mlflow": {"run_id": ...}}`` names it.
    - ``wandb``: in ``folder/wandb``. It asks for an account, unless
      ``options={"wandb": {"mode": "offline"}}``. To go on with a run, give its ``id`` and
      ``"resume": "allow"``; W&B takes no values of steps that it has already.
    - ``trackio``: where the environment's ``TRACKIO_DIR`` says when it is first imported.

    Args:
        trackers: their names, or live trackers; with none, those that the Accelerator was made
            with (``log_with=...``). Those that ``accelerator.init_trackers`` has started already
            are only logged to; the others are started here, and finished at the end of the run.
        project: the name to log under: W&B's and Trackio's project, MLflow's experiment,
            TensorBoard's folder.
        folder: where to write; by default the Accelerator's ``logging_dir``, or else ``runs``.
        hyperparameters: of the run, to tell the trackers at its start.
        options: more arguments for a tracker's constructor, by its name.

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
        self._group: SinkGroup | None = None
        for tracker in self._trackers:
            if isinstance(tracker, str):
                _check_installed(tracker)
        unknown = {*self._options} - {_name(tracker) for tracker in self._trackers}
        if self._trackers and unknown:
            raise PipelineConfigError(
                f"TrackerSink.options are for {', '.join(sorted(unknown))}, which trackers="
                f"{[_name(tracker) for tracker in self._trackers]} does not name"
            )

    def open(self, args: PipelineHookArgs) -> None:
        """Start the trackers.

        Raises:
            PipelineConfigError: none are named, and the Accelerator has none.
            Exception: what a tracker raises that can't be started.
        """
        sinks: dict[str, MetricsSink] = {}
        for tracker in self._trackers or _trackers_of(args.accelerator):
            live = self._made(tracker, args) if isinstance(tracker, str) else tracker
            started = any(live is known for known in args.accelerator.trackers)
            sinks[_name(tracker)] = _TrackerSink(live, started, self._hyperparameters)
        self._group = SinkGroup(sinks, type(self).__name__)
        self._group.open(args)

    def write(self, record: MetricsRecord) -> None:
        """Log a record to each tracker that has not failed."""
        assert self._group is not None  # since it was opened
        self._group.write(record)

    def close(self) -> None:
        """Finish the trackers that were started here."""
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _made(self, name: str, args: PipelineHookArgs) -> GeneralTracker:
        """A tracker, not started."""
        accelerator, options = args.accelerator, self._options.get(name, {})
        if name == "mlflow" and self._folder is not None:
            _use_folder_for_mlflow(self._folder)
            options = {"logging_dir": (self._folder / "mlflow").absolute().as_uri(), **options}
        if name == "wandb" and self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)  # else it writes elsewhere
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
    """Which trackers to log to, and where.

    >>> TrackerSinkConfig(options={"wandb": {"mode": "offline"}}).trackers
    []
    """

    class_type: type[TrackerSink] = TrackerSink
    trackers: list[str] = Field(
        default=[],
        description="Names of trackers, such as 'tensorboard', 'wandb', 'mlflow' or 'trackio'; "
        "by default those that the Accelerator was made with.",
    )
    project: Annotated[str, RunPath(joined=False)] = Field(
        default="training", min_length=1, description="The name to log under in each tracker."
    )
    folder: Annotated[str | None, RunPath()] = Field(
        default=None,
        min_length=1,
        description="Where trackers that write files put them; by default the Accelerator's "
        "logging_dir, or else 'runs'.",
    )
    hyperparameters: dict[str, Hyperparameter] = Field(
        default={}, description="What the trackers are told about the run at its start."
    )
    options: dict[str, dict[str, Any]] = Field(
        default={}, description="More arguments for the constructor of a tracker, by its name."
    )


class _TrackerSink:
    """One tracker."""

    def __init__(
        self,
        tracker: GeneralTracker,
        started: bool,
        hyperparameters: Mapping[str, Hyperparameter],
    ) -> None:
        self._tracker = tracker
        self._started = started  # by someone else, who will finish it
        self._hyperparameters = dict(hyperparameters)

    def open(self, args: PipelineHookArgs) -> None:
        if not self._started:
            self._tracker.start()
        # TensorBoard would have another run of their own in its folder after each resume.
        again = self._tracker.name == "tensorboard" and args.progress.global_step_id > 0
        if self._hyperparameters and not again:
            self._tracker.store_init_configuration(self._hyperparameters)

    def write(self, record: MetricsRecord) -> None:
        for step, values in record.by_step().items():
            self._tracker.log(values, step=step)

    def close(self) -> None:
        if not self._started:
            self._tracker.finish()


def _trackers_of(accelerator: Any) -> Sequence[TrackerLike]:
    """Those that are started, or else those that the Accelerator was made with."""
    trackers = accelerator.trackers or accelerator.log_with
    if not trackers:
        raise PipelineConfigError(
            "TrackerSink.trackers names none, and the Accelerator was made without any; give "
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


def _use_folder_for_mlflow(folder: Path) -> None:
    mlflow = importlib.import_module("mlflow")  # typed nowhere where it is not installed
    folder.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{folder.absolute() / 'mlflow.db'}")


def _name(tracker: TrackerLike) -> str:
    return tracker if isinstance(tracker, str) else str(tracker.name)
