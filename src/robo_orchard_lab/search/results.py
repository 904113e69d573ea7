"""Results of a sweep: ranking of the trials, importance of the parameters, and a page of both."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from robo_orchard_core.utils.logging import one_line
from robo_orchard_lab.experiment.run_folder import CONFIG_FILE
from robo_orchard_lab.report.listing import is_run
from robo_orchard_lab.report.page import Table, render, write
from robo_orchard_lab.search.storage import FAILED, PRUNED, chains

PAGE_FILE = "sweep.html"
_STATES = {
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class TrialResult:
    """Outcome of a trial.

    Attributes:
        number: Number of the trial, which names its run folder.
        state: completed, pruned, failed, interrupted, running or waiting.
        value: Result; for other states than completed, the best value so far, or None.
        step: Completed steps at the value, or None.
        parameters: Values by dotted field; names for choices with names.
        run: Run folder.
        problem: Error of a failed run.
    """

    number: int
    state: str
    value: float | None
    step: int | None
    parameters: dict[str, Any]
    run: Path
    problem: str | None


def results(study: optuna.Study, folder: Path) -> list[TrialResult]:
    """Return the trials of a sweep: completed ones from the best, then the others by number."""
    is_max = study.direction == optuna.study.StudyDirection.MAXIMIZE
    found = []
    for chain in chains(study):
        trial = chain.last
        values = {step: v for step, v in trial.intermediate_values.items() if v == v}
        step = None
        if values:
            step = (max if is_max else min)(values, key=lambda at: (values[at], at))
        value = None if step is None else values[step]
        if trial.state == TrialState.COMPLETE and trial.value != value:  # of the last step
            value, step = trial.value, max(values, default=None)
        found.append(
            TrialResult(
                number=chain.number,
                state="interrupted" if chain.is_lost else _STATES[trial.state],
                value=value,
                step=trial.user_attrs.get(PRUNED, step),
                parameters=dict(trial.params),
                run=folder / "trials" / f"{chain.number:04d}",
                problem=trial.user_attrs.get(FAILED),
            )
        )
    sign = -1.0 if is_max else 1.0

    def rank(result: TrialResult) -> tuple[bool, float, int]:
        is_ranked = result.state == "completed" and result.value is not None
        return not is_ranked, sign * (result.value or 0) if is_ranked else 0.0, result.number

    return sorted(found, key=rank)


def importance(study: optuna.Study) -> dict[str, float]:
    """Return the share of each parameter in the variation of the best results, largest first.

    Estimated by PED-ANOVA (Watanabe et al., 2023, https://arxiv.org/abs/2304.10255); empty for
    fewer than three completed trials, or equal results.
    """
    completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(completed) < 3 or len({trial.value for trial in completed}) < 2:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


@dataclass(frozen=True)
class SweepResults:
    """Ranking of a sweep, for a terminal, a page, or a program.

    Attributes:
        metric: Optimized metric.
        trials: Trials, see `results`.
        importance: Share of each parameter, see `importance`.
        command: Command that repeats the run of the best trial with the same weights, or None.
    """

    metric: str
    trials: list[TrialResult]
    importance: dict[str, float]
    command: str | None

    @classmethod
    def read(cls, study: optuna.Study, folder: Path, trust: Sequence[str] = ()) -> SweepResults:
        """Read the results of a study whose runs are in the folder of the sweep."""
        found = results(study, folder)
        best = found[0] if found and found[0].state == "completed" else None
        command = None if best is None else _command_of(best, folder, trust)
        metric = str(study.user_attrs.get("metric", "value"))
        return cls(metric, found, importance(study), command)

    def tables(self) -> list[Table]:
        """Return the ranking and the importance as text."""
        fields = [*dict.fromkeys(name for trial in self.trials for name in trial.parameters)]
        rows = [
            [
                str(trial.number),
                trial.state,
                "" if trial.value is None else f"{trial.value:.5g}",
                "" if trial.step is None else f"{trial.step:,}",
                *(_text(trial.parameters[n]) if n in trial.parameters else "" for n in fields),
            ]
            for trial in self.trials
        ]
        note = "" if self.command is None else f"repeat the best run:\n  {self.command}"
        tables = [Table("Trials", ["trial", "state", self.metric, "step", *fields], rows, note)]
        if self.importance:
            shares = [[name, f"{share:.0%}"] for name, share in self.importance.items()]
            tables.append(Table("Importance", ["parameter", "importance"], shares))
        return tables

    def write_page(self, folder: Path) -> Path | None:
        """Write sweep.html with the tables and a comparison of the runs; None without runs.

        Raises:
            OSError: The page can't be written.
        """
        runs = [trial.run for trial in self.trials if is_run(trial.run)]
        if not runs:
            return None
        title = f"Sweep: {folder.resolve().name}"
        page = folder / PAGE_FILE
        write(page, render(runs, sort=self.metric, title=title, tables=self.tables()))
        return page


def _command_of(result: TrialResult, folder: Path, trust: Sequence[str]) -> str:
    options = [part for package in trust for part in ("--trust", package)]
    again = str(folder / "repeated" / result.run.name)
    config = str(result.run / CONFIG_FILE)
    arguments = ["train", config, "--run_folder", again, "--hooks.sweep=null", *options]
    return shlex.join(["robo-orchard-lab", *arguments])


def _text(value: Any) -> str:
    return one_line(f"{value:.5g}" if isinstance(value, float) else str(value))
