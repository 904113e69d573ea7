"""Fields of runs by name: state, configuration, and metrics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from robo_orchard_core.utils.config.errors import ConfigError, did_you_mean, dotted
from robo_orchard_lab.experiment.overrides import leaves
from robo_orchard_lab.report.files import Problems, inside, mapping, read_object, text
from robo_orchard_lab.report.jobs import with_slurm_states
from robo_orchard_lab.report.listing import RunSummary, find_runs, summarize
from robo_orchard_lab.report.position import last_record
from robo_orchard_lab.report.series import Curve, Metrics, Mode, guess_mode, read_metrics
from robo_orchard_lab.report.story import ENVIRONMENT, read_configuration

MISSING: Any = object()
"""Value of a field that a run lacks; a null of its configuration is None."""

Choice: TypeAlias = Literal["last", "best", "min", "max"]
"""Value of a metric that stands for the run."""

STATE_FIELDS = {
    "run": "path",
    "name": "name",
    "state": "state",
    "job": "job_state",
    "job_id": "job_id",
    "steps": "steps",
    "epochs": "epochs",
    "time": "seconds",
    "metric": "metric",
    "best": "best",
    "best_step": "best_step",
    "commit": "commit",
    "changed": "changed",
    "started": "started_at",
    "updated": "updated_at",
}
"""Fields of the state of a run, with their names in `RunSummary`; ``time`` is in seconds."""
_ALIASES = {"status": "state", "step": "steps", "epoch": "epochs", "seconds": "time"}
_CLASS_KEYS = (".class_type", ".func")
_SHOWN = 12  # fields of a kind in an error


class Run:
    """Run with its fields; files are read when a field needs them.

    Args:
        folder: run folder.
        root: folder that the list of runs begins at; the field ``run`` is the path below it.
        metric: metric of the field ``best``, see `summarize`.
    """

    def __init__(self, folder: Path, root: Path, metric: str | None = None) -> None:
        problems = Problems()
        self.folder = folder
        self.path = text(str(folder.relative_to(root) if folder != root else folder))
        self._config = read_configuration(folder, problems)
        summary = summarize(folder, metric, self._config)
        self.summary: RunSummary = replace(summary, problems=(*problems, *summary.problems))
        self._metrics: dict[str, Metrics] = {}

    def state(self, name: str) -> Any:
        """Return a field of `STATE_FIELDS`; `MISSING` if unknown."""
        if name == "run":
            return self.path
        if name == "name":
            return self._config.document.get("name") or self.folder.resolve().name
        value = getattr(self.summary, STATE_FIELDS[name])
        if name in ("started", "updated") and value is not None:
            return datetime.fromisoformat(value)
        return MISSING if value is None else value

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """Values by dotted path; the path of a part has the name of its class or function."""
        values = self._config.values or _script_values(self.folder)
        parts = {
            path.removesuffix(key): str(value).rpartition(":")[2]
            for path, value in values.items()
            for key in _CLASS_KEYS
            if path.endswith(key)
        }
        return {**values, **parts}

    def curves(self, name: str) -> dict[str, Curve]:
        """Return the metrics of a name or of a short one, such as val/loss of eval/val/loss."""
        if name not in self._metrics:
            file = self._config.metrics_file(self.folder)
            self._metrics[name] = read_metrics(file, Problems(), suffix=name)
        found = self._metrics[name].curves
        return {each: found[each] for each in found if _ends_with(each, name, "/")}

    def metric(self, name: str, choice: Choice) -> Any:
        """Return a value of a metric; `MISSING` without one, or without a known direction."""
        curve = self.curves(name).get(name)
        mode = self.mode(name) if choice == "best" else choice
        if curve is None or mode is None:
            return MISSING
        found = curve.last() if mode == "last" else curve.best(mode)
        return MISSING if found is None else found[1]

    def mode(self, metric: str) -> Mode | None:
        """Return the direction of a metric, declared or judged by its name; None if unknown."""
        return self._config.modes().get(metric) or guess_mode(metric)

    def metric_names(self) -> set[str]:
        """Return the metrics of the last record and of evaluations, for an error."""
        file = self._config.metrics_file(self.folder)
        return {
            *mapping(last_record(file).get("metrics")),
            *read_metrics(file, Problems(), prefix="eval/").curves,
        }


def _script_values(folder: Path) -> dict[str, Any]:
    """Return the configuration of a script's run, from environment.json or a checkpoint."""
    problems = Problems()
    found = read_object(folder / ENVIRONMENT, problems)
    saved = inside(folder, "checkpoints/last/manifest.json")
    if not found and saved is not None:
        found = mapping(read_object(saved, problems).get("metadata"))
    values = {dotted(path): v for path, v in leaves(mapping(found.get("configuration")))}
    return {path: _number(value) for path, value in values.items()}


def _number(value: Any) -> Any:
    """Return a float for its text, as scripts record options of optimizers."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read_runs_of(folder: Path, metric: str | None = None) -> list[Run]:
    """Return the runs in a folder and below; SLURM is asked for the states of their jobs."""
    runs = [Run(run, folder, metric) for run in find_runs(folder)]
    jobs = with_slurm_states(run.summary.job for run in runs)
    for run, job in zip(runs, jobs, strict=True):
        run.summary = replace(run.summary, job=job)
    return runs


# --- names of fields -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Field:
    """Field of runs.

    Attributes:
        name: name as written by the user.
        value: function that returns the value of a run; `MISSING` without one.
        metric: metric of a field ``METRIC:best``; else "".
    """

    name: str
    value: Callable[[Run], Any]
    metric: str = ""

    def sort_key(self, run: Run) -> tuple[Any, ...]:
        """Return the key that sorts runs, the best metric last; empty for an unknown value."""
        value = self.value(run)
        if value is MISSING or value is None or value != value:
            return ()
        mode = run.mode(self.metric) if self.metric else None
        if self.name == "best":
            mode = run.summary.mode
        if isinstance(value, bool | int | float):
            return 1, -value if mode == "min" else value
        return (2, value) if isinstance(value, datetime) else (3, str(value))


def find_field(name: str, runs: Sequence[Run]) -> Field:
    """Find a field of runs by its name: state, then configuration, then metric.

    A dotted path of the configuration, and a name of a metric, may be shortened to its end where
    one field alone ends so. ``METRIC:best`` selects a value of a metric: ``last`` (the default),
    ``best``, ``min`` or ``max``.

    Raises:
        ConfigError: no run has the field, several fields end so, or the metric has no direction.
    """
    state = _ALIASES.get(name, name)
    if state in STATE_FIELDS:
        return Field(state if name == "status" else name, lambda run: run.state(state))
    metric, _, chosen = name.rpartition(":")
    if not metric or chosen not in get_args(Choice):
        paths = {path for run in runs for path in run.configuration}
        if path := _find(name, paths, "."):
            return Field(name, lambda run: run.configuration.get(path, MISSING))
        metric, chosen = name, "last"
    choice: Choice = chosen  # type: ignore[assignment]  # checked above
    key = _find(metric, {found for run in runs for found in run.curves(metric)}, "/")
    if not key:
        raise _unknown(metric, runs)
    field = Field(name, lambda run: run.metric(key, choice), key if choice == "best" else "")
    if choice == "best" and not any(run.mode(key) for run in runs):
        raise ConfigError(
            f"{key} has no known direction, so no value is the best; write {metric}:min or "
            f"{metric}:max"
        )
    return field


def _find(name: str, known: Collection[str], separator: str) -> str:
    """Return the known name that equals or ends with a name; "" without one."""
    if name in known:
        return name
    found = sorted(each for each in known if _ends_with(each, name, separator))
    if len(found) > 1:
        raise ConfigError(f"{name!r} is the end of several fields; write one of {_listed(found)}")
    return found[0] if found else ""


def _ends_with(name: str, end: str, separator: str) -> bool:
    return name == end or name.endswith(separator + end)


def _unknown(name: str, runs: Sequence[Run]) -> ConfigError:
    paths = {path: None for run in runs for path in run.configuration}
    metrics = {metric for run in runs[:50] for metric in run.metric_names()}
    ends = {path.rpartition(".")[2] for path in paths}
    advice = did_you_mean(name, [*STATE_FIELDS, *paths, *ends, *metrics])
    known = (
        f"The fields are {', '.join(STATE_FIELDS)}; of the configuration {_listed([*paths])}; "
        f"metrics {_listed(sorted(metrics))}"
    )
    problem = f"no run has a field {name!r}; "
    return ConfigError(problem + (f"{advice} {known}" if advice else f"t{known[1:]}"))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "") or "none"
