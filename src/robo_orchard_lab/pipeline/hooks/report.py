"""Hook that writes the report of a run while it runs, and when it ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import psutil  # type: ignore[import-untyped]  # accelerate brings it
from pydantic import Field

from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.job_log import announce, job_logger
from robo_orchard_lab.pipeline.run.durable import (
    RetriedWrite,
    make_folder,
    remove_leftovers,
    replace_file,
)

logger = job_logger(__name__)

REPORT_FILE = "report.html"
ENVIRONMENT_FILE = "environment.json"
"""Command, versions, git state and configuration of a run that a script started."""
_WAIT_S = 30.0  # for a report at the end of the run; another one then goes on by itself
_NICENESS = 10
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# As ``python -m robo_orchard_lab``, with the package of this process.
_PROGRAM = (
    "import sys; package = sys.argv.pop(1); package in sys.path or sys.path.insert(0, package); "
    "from robo_orchard_lab.cli.main import main; sys.exit(main())"
)


class Report(PipelineHooks):
    """Report of the run as one HTML file, ``report.html`` in the run folder.

    The page has the outcome, curves, evaluations, events, checkpoints, hooks, configuration and
    environment. Another process writes it from the files of the run folder, with
    ``robo-orchard-lab report``: after an epoch, if the last report is ``every_seconds`` old, and
    when the run ends, also by an error. The curves come from a ``MetricsLogger`` with a
    ``JsonLinesSink``. A report that can't be written, as on a full disk, is reported once, and the
    run continues.

    - Ranks: the main process starts the other process.
    - Requests: none.
    - State: none.
    - Cost: nothing in a step; the start of a process after an epoch, and the wait for the last
      report at the end of the run, about half a second.

    >>> ReportConfig(every_seconds=60)().name
    'Report'
    """

    keeps_trajectory = True
    published_metrics = ()
    reads = ()
    changes = ("files",)
    requests = ()

    def __init__(self, cfg: ReportConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._started_at = -float("inf")
        self._first_step = 0
        self._writes = RetriedWrite(self.name, logger)
        self.register_for_loop(self._begin)
        # Before an epoch, since the metrics of an epoch are written after its `after`s.
        self.on_epoch.before(self._update)

    def _begin(self, args: PipelineHookArgs) -> RemovableHandle:
        run = args.run
        self._folder = run.folder if args.accelerator.is_main_process else None
        self._first_step = run.progress.global_step_id
        if run.folder is None:
            logger.warning("%s: there is no report, since the trainer has no run_folder", self.name)
        elif self._folder is not None:
            with suppress(OSError):  # writing reports the error
                remove_leftovers(self._path)
            if not (self._folder / "starts").is_dir():  # the records of an experiment file
                self._write_environment(args)
            run.state_file.at_end[self.name] = self._finish
        return RemovableHandle(lambda: None)

    def _write_environment(self, args: PipelineHookArgs) -> None:
        assert self._folder is not None
        found = {"host": socket.gethostname(), "folder": os.getcwd(), **args.run.describe()}
        path = self._folder / ENVIRONMENT_FILE
        try:
            make_folder(self._folder)
            replace_file(path, json.dumps(found, indent=1).encode() + b"\n")
        except OSError as error:
            self._writes.failed(f"writing {path}", error, "the run continues")

    def _update(self, args: PipelineHookArgs) -> None:
        if self._folder is None or args.progress.global_step_id == self._first_step:
            return
        if time.monotonic() - self._started_at >= self.cfg.every_seconds and self._collect(0.0):
            self._start()

    def _finish(self) -> None:
        """Write the last report, after the outcome of the run is on disk."""
        if self._process is not None and not self._collect(_WAIT_S):
            self._process.kill()
            self._collect(_WAIT_S)
        self._start()
        if self._process is not None and not self._collect(_WAIT_S):
            logger.warning("process %d is still writing %s", self._process.pid, self._path)
        elif self._writes.failure is None:
            announce(logger, f"{self.name}: wrote {self._path}", is_routine=True)

    def _start(self) -> None:
        assert self._folder is not None
        self._started_at = time.monotonic()
        package, folder = str(Path(__file__).parents[3]), str(self._folder)
        self._errors = TemporaryFile()  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, package, "report", folder],
                env={name: value for name, value in os.environ.items() if name not in _OF_RANKS},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                start_new_session=True,  # a Ctrl-C, and a launcher's signal, end the run alone
            )
            with suppress(psutil.Error):
                psutil.Process(self._process.pid).nice(_NICENESS)
        except OSError as error:
            self._failed(error)

    def _collect(self, wait_s: float) -> bool:
        """Report the result of the process; return False if it still runs."""
        if self._process is None:
            return True
        try:
            code = self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return False
        self._process = None
        assert self._errors is not None
        with self._errors as file:
            file.seek(0)
            lines = file.read(4096).decode("utf-8", "replace").split("\n")
        if code == 0:
            self._writes.succeeded(self._path)
        else:
            said = next((line for line in lines if line.startswith("error:")), lines[-1])
            self._failed(RuntimeError(said.removeprefix("error: ") or f"exit code {code}"))
        return True

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return self._folder / REPORT_FILE

    def _failed(self, error: Exception) -> None:
        self._writes.failed(f"writing {self._path}", error, "the run continues")


class ReportConfig(PipelineHooksConfig[Report]):
    """Interval of reports.

    >>> ReportConfig().every_seconds
    30.0
    """

    class_type: type[Report] = Report
    every_seconds: float = Field(
        default=30.0,
        ge=0,
        description="Shortest time between two reports during the run, in seconds; a report is "
        "written after an epoch, and always at the end of the run.",
    )
