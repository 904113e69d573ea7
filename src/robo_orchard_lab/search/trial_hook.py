"""Hook of a sweep's run: it reports the metric to the study and stops pruned trials."""

from __future__ import annotations

import os
import signal
import stat
import threading
from typing import TYPE_CHECKING

from pydantic import Field

from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.distributed.collectives import broadcast_object
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.metrics import MetricValue, number_text
from robo_orchard_lab.pipeline.requests import Requests

if TYPE_CHECKING:
    from optuna import Trial

logger = job_logger(__name__)


class SweepTrial(PipelineHooks):
    """Report of the metric to the study of a sweep, and a stop if the trial is pruned.

    A sweep adds the hook to the run of each trial. Without the sweep, as in a repetition of the
    run, the hook does nothing. The run gets SIGTERM when the process of the sweep dies, except in a
    cluster job.

    - Ranks: the first rank reports and decides; all ranks stop at the same commit point.
    - Requests: a stop.
    - State: none; the study has the values.
    - Cost: for each value of the metric, a write to the study, a read of its values, and a
      collective.
    """

    keeps_trajectory = True
    reads = ("metrics",)
    changes = ()
    requests = ("stop",)

    def __init__(self, cfg: SweepTrialConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._storage = ""
        self._trial: Trial | None = None
        self._requests: Requests | None = None  # None without a sweep
        self._is_job = False
        self._reported: set[int] = set()
        self.register_for_loop(self._begin)

    def _begin(self, args: PipelineHookArgs) -> RemovableHandle:
        from robo_orchard_lab.search.storage import STORAGE_VARIABLE

        self._storage = os.environ.get(STORAGE_VARIABLE, "")
        if not self._storage:
            logger.info("%s: no sweep started this run; nothing is reported", self.name)
        else:
            self._requests, self._is_job = args.requests, args.accelerator.num_processes > 1
            if args.accelerator.is_main_process:
                self._connect()
                if stat.S_ISFIFO(os.fstat(0).st_mode):  # not in a job
                    threading.Thread(target=_terminate_with_sweep, daemon=True).start()
        return args.metrics.subscribe(self.cfg.metric, self._report, who=self.name)

    def _connect(self) -> Trial:
        """Return the newest attempt of the trial, to which values are reported."""
        import optuna

        from robo_orchard_lab.search.space import make_pruner
        from robo_orchard_lab.search.storage import newest_attempt, open_storage

        opened = open_storage(self._storage)
        study = optuna.load_study(study_name=self.cfg.study, storage=opened)
        study.pruner = make_pruner(study.user_attrs.get("pruner"))
        attempt = newest_attempt(study, self.cfg.trial)
        study_id = opened.get_study_id_from_name(self.cfg.study)
        trial_id = opened.get_trial_id_from_study_id_trial_number(study_id, attempt.number)
        self._trial = optuna.Trial(study, trial_id)
        self._reported = {*attempt.intermediate_values}
        return self._trial

    def _report(self, found: MetricValue) -> None:
        if self._requests is None:
            return
        is_pruned = self._is_pruned(found)
        if self._is_job:
            is_pruned = broadcast_object(is_pruned, 0)  # a collective
        if is_pruned:
            value = number_text(found.value)
            self._requests.stop(
                f"pruned: {found.name} is {value} at step {found.step}", by=self.name
            )

    def _is_pruned(self, found: MetricValue) -> bool:
        """Report a value to the study; return True if the trial is pruned. For the first rank."""
        from optuna.exceptions import UpdateFinishedTrialError

        if self._trial is None:
            return False
        try:
            try:
                return self._ask_study(self._trial, found)
            except UpdateFinishedTrialError:  # this job outlives its sweep, and is repeated
                return self._ask_study(self._connect(), found)
        except Exception as error:  # of the database or its driver
            problem = "%s: the study can't be reached, the run continues: %s"
            logger.warning(problem, self.name, error)
            return False

    def _ask_study(self, trial: Trial, found: MetricValue) -> bool:
        from robo_orchard_lab.search.storage import PRUNED

        if found.step not in self._reported:  # by a resumed run
            trial.report(found.value, found.step)
            self._reported.add(found.step)
        if not trial.should_prune():
            return False
        trial.set_user_attr(PRUNED, found.step)
        return True


def _terminate_with_sweep() -> None:
    """End this process with SIGTERM when standard input, a pipe from the sweep, closes."""
    while os.read(0, 1024):  # not sys.stdin, whose lock would block the end of the interpreter
        pass
    os.kill(os.getpid(), signal.SIGTERM)


class SweepTrialConfig(PipelineHooksConfig[SweepTrial]):
    """Study and trial of a run.

    >>> SweepTrialConfig(study="spirals", trial=3, metric="eval/val/loss")().name
    'SweepTrial'
    """

    class_type: type[SweepTrial] = SweepTrial
    study: str = Field(description="Name of the study.")
    trial: int = Field(ge=0, description="Number of the trial in the study.")
    metric: str = Field(description="Metric to report, such as eval/val/loss.")
