"""Progress bar in a terminal, log lines elsewhere."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.live import Live

from launching import launch
from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline import SimpleBatchProcessor, TrainerLimits, TrainerProgress
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.hooks import ProgressBarHookConfig
from robo_orchard_lab.pipeline.hooks.metrics_logger import MetricsLoggerConfig
from robo_orchard_lab.pipeline.metrics import UnknownMetricError
from robo_orchard_lab.pipeline.progress import remaining_steps
from robo_orchard_lab.pipeline.run_display import AlignedLines, RunStatus, _BarLine
from robo_orchard_lab.pipeline.trigger import EverySteps
from robo_orchard_lab.testing import assert_weights_unchanged
from tiny import loss_of, make_loader, make_model, make_trainer

EVERY_STEP, NO_STEP = 1e-9, 1e6
"""In seconds: shorter than any step, and longer than any test."""


class AtStep(PipelineHooks):
    """Hook that calls a function at the end of one step."""

    def __init__(self, global_step_id: int, call: Any) -> None:
        super().__init__()
        self.global_step_id, self.call = global_step_id, call
        self.register_hook("on_step", HookContext.from_callable(after=self.after))

    def after(self, args: PipelineHookArgs) -> None:
        if args.global_step_id == self.global_step_id:
            self.call(args)


def fail(args: PipelineHookArgs) -> None:
    raise RuntimeError("out of luck")


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the logged lines without their times."""
    lines = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
    decided = (r"\d+:\d\d:\d\d", "T"), (r"[\d.,]+(?= samples/s)", "N"), (r", lr 1\.00e-01", "")
    for pattern, letter in decided:
        lines = [re.sub(pattern, letter, line) for line in lines if line.startswith("epoch")]
    return [re.sub(r"(?<=loss )[\d.]+", "L", line) for line in lines]


def values_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return position, losses and metrics of the logged lines."""
    lines = [line for line in caplog.messages if line.startswith("epoch")]
    return [re.sub(r"(, lr [\d.e+-]+)?(, [\d,]+ samples/s.*|$)", "", line) for line in lines]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


class TestLines:
    """Output that is not a terminal."""

    def test_each_epoch_and_the_end_has_a_line(self, log: pytest.LogCaptureFixture) -> None:
        """A short run has a line after each epoch, and at the end with its duration."""
        make_trainer(ProgressBarHookConfig(refresh_seconds=NO_STEP), max_epoch=2)()
        assert lines_of(log) == [
            "epoch 1/2, step  7/14 (50 %), loss L, N samples/s, ETA T",
            "epoch 2/2, step 14/14 (100 %), loss L, N samples/s, ETA T",
            "epoch 2/2, step 14/14 (100 %), loss L, N samples/s, took T",
        ]

    def test_lines_follow_the_interval(self, log: pytest.LogCaptureFixture) -> None:
        """Each step has a line, counted from 1, if the interval is shorter than a step."""
        make_trainer(ProgressBarHookConfig(refresh_seconds=EVERY_STEP), max_step=3)()
        assert [line.split(",")[1].split(" (")[0] for line in lines_of(log)] == [
            *(" step 1/3", " step 2/3", " step 3/3"),  # the steps
            *(" step 3/3", " step 3/3"),  # the started epoch, and the end
        ]

    def test_lines_go_to_stderr_without_info_log(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Without a log at level INFO, lines are printed with their time."""
        make_trainer(ProgressBarHookConfig(refresh_seconds=NO_STEP), max_epoch=1)()
        out, err = capsys.readouterr()
        assert out == ""
        times, lines = zip(*(line.split(" ", 2)[1:] for line in err.splitlines()), strict=True)
        assert all(re.fullmatch(r"\d\d:\d\d:\d\d", time) for time in times)
        assert [line.split(", ")[0] for line in lines[:3]] == [
            *("model: Sequential", "data: TensorDataset", "run: 1 epoch")
        ]
        assert [line.split(", ")[:2] for line in lines[3:]] == [
            ["epoch 1/1", "step 7/7 (100 %)"]
        ] * 2

    def test_epoch_without_length_has_no_total_yet(self, log: pytest.LogCaptureFixture) -> None:
        """The total of data without a length is unknown in the first epoch only."""

        class Unsized:
            def __iter__(self) -> Iterator[Any]:
                return iter(make_loader(batches=2))

        hook = ProgressBarHookConfig(refresh_seconds=EVERY_STEP)
        make_trainer(hook, loader=Unsized(), max_epoch=2)()
        assert [line.split(",")[1] for line in lines_of(log)] == [
            *(" step 1", " step 2", " step 2/4 (50 %)"),
            *(" step 3/4 (75 %)", " step 4/4 (100 %)", " step 4/4 (100 %)", " step 4/4 (100 %)"),
        ]

    def test_resumed_run_shows_its_counters(
        self, log: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        """After a resume within an epoch, epoch and step are those of the run."""
        hook = ProgressBarHookConfig(refresh_seconds=EVERY_STEP)
        given_up = make_trainer(hook, max_step=10)
        given_up()
        given_up.save_checkpoint(tmp_path / "saved")
        log.clear()
        make_trainer(hook, max_epoch=3, resume_from=tmp_path / "saved")()
        lines = lines_of(log)
        assert lines[0] == "epoch 2/3, step 11/21 (52 %), loss L, N samples/s, ETA T"
        assert lines[-1] == "epoch 3/3, step 21/21 (100 %), loss L, N samples/s, took T"

    def test_error_leaves_the_last_step(self, log: pytest.LogCaptureFixture) -> None:
        """After an error in a step, the last line has the completed steps."""
        trainer = make_trainer(
            [ProgressBarHookConfig(refresh_seconds=NO_STEP), AtStep(9, fail)], max_epoch=2
        )
        with pytest.raises(RuntimeError, match="out of luck"):
            trainer()
        assert lines_of(log)[-1].startswith("epoch 2/2, step  9/14 (64 %)")
        assert lines_of(log)[-1].endswith("stopped after T")

    def test_stopped_run_is_shown_as_stopped(self, log: pytest.LogCaptureFixture) -> None:
        """After a requested stop, the last line does not claim a finished run."""
        stop = AtStep(2, lambda args: args.requests.stop("enough"))
        make_trainer([ProgressBarHookConfig(refresh_seconds=NO_STEP), stop], max_epoch=2)()
        assert lines_of(log)[-1] == (
            "epoch 1/2, step  3/14 (21 %), loss L, N samples/s, stopped after T"
        )

    def test_failure_before_the_first_step(self, log: pytest.LogCaptureFixture) -> None:
        """Without a step, the last line has no loss and no rate."""
        with pytest.raises(RuntimeError, match="out of luck"):
            make_trainer(
                [ProgressBarHookConfig(refresh_seconds=NO_STEP), AtStep(0, fail)], max_step=2
            )()
        assert lines_of(log) == ["epoch 1, step 0/2 (0 %), stopped after T"]

    def test_metrics_are_shown_once_published(self, log: pytest.LogCaptureFixture) -> None:
        """A metric appears after the loss from its first publication on."""
        publish = AtStep(1, lambda args: args.metrics.publish("lift", torch.tensor(2.5)))
        hook = ProgressBarHookConfig(metrics=["lift"], refresh_seconds=EVERY_STEP)
        make_trainer([hook, publish], max_step=2)()
        assert ["lift 2.5000" in line for line in lines_of(log)] == [False, True, True, True]

    def test_unpublished_metric_is_an_error(self, log: pytest.LogCaptureFixture) -> None:
        """At the end, the error names the missing metric and the published ones."""
        publish = AtStep(1, lambda args: args.metrics.publish("lift", 2.5))
        trainer = make_trainer([ProgressBarHookConfig(metrics=["left"]), publish], max_step=2)
        error = "'left' was published, which ProgressBarHook waits for; did you mean 'lift'"
        with pytest.raises(UnknownMetricError, match=error):
            trainer()
        assert trainer.progress.global_step_id == 2
        assert lines_of(log)[-1].startswith("epoch 1, step 2/2 (100 %)")

    def test_force_color_does_not_make_a_file_a_terminal(self, tmp_path: Path) -> None:
        """A file gets lines without control codes with FORCE_COLOR, as on build servers."""
        script = tmp_path / "script.py"
        script.write_text(SCRIPT, encoding="utf-8")
        finished = subprocess.run(
            [sys.executable, script],
            env={**os.environ, "FORCE_COLOR": "1"},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr
        assert "\x1b" not in finished.stderr + finished.stdout
        assert "epoch 1/2, step  7/14 (50 %)" in finished.stderr


class Publisher(PipelineHooks):
    """Hook that publishes a loss in every step and evaluates after every epoch."""

    published_metrics = ("loss/total", "eval/accuracy")

    def __init__(self) -> None:
        super().__init__()
        self.on_loop.before(self.open)
        self.on_step.after(self.publish)
        self.register_at_commit(lambda args: args.requests.evaluate("it is time"), "1 epoch")

    def open(self, args: PipelineHookArgs) -> None:
        args.run.evaluations[self.name] = self.evaluate

    def publish(self, args: PipelineHookArgs) -> None:
        args.metrics.publish("loss/total", torch.tensor(float(args.global_step_id + 1)))

    def evaluate(self, args: PipelineHookArgs) -> None:
        args.metrics.publish("eval/accuracy", args.epoch_id / 10)


class TestLogged:
    """Runs with logging points."""

    def test_line_has_values_of_the_last_logging_point(self, log: pytest.LogCaptureFixture) -> None:
        """The loss is the mean of its window until the next logging point."""
        bar = ProgressBarHookConfig(refresh_seconds=EVERY_STEP)
        make_trainer([bar, MetricsLoggerConfig(every=EverySteps(3)), Publisher()], max_step=7)()
        shown = [re.sub(r".*step (\d)/7 \(\d+ %\)", r"\1", line) for line in values_of(log)]
        own = [re.fullmatch(r"(\d), loss \d\.\d{4}", line) for line in shown[:3]]
        assert [found and found[1] for found in own] == ["1", "2", "3"]  # this rank's loss
        assert shown[3:] == [
            *("4, loss 2.0000", "5, loss 2.0000", "6, loss 2.0000"),
            *(
                "7, loss 5.0000",
                *["7, loss 7.0000, eval/accuracy 0.1000"] * 2,
            ),  # the epoch, and the end
        ]

    @pytest.mark.parametrize("first", ["bar", "logger"])
    def test_epoch_line_has_values_of_the_epoch_end(
        self, first: str, log: pytest.LogCaptureFixture
    ) -> None:
        """The line follows the evaluation at the end of the epoch, in any order of hooks."""
        bar = ProgressBarHookConfig(metrics=["eval/accuracy"], refresh_seconds=NO_STEP)
        logger = MetricsLoggerConfig()
        hooks: list[Any] = [bar, logger, Publisher()]
        make_trainer(hooks if first == "bar" else [Publisher(), logger, bar], max_epoch=2)()
        assert values_of(log) == [
            "epoch 1/2, step  7/14 (50 %), loss 4.0000, eval/accuracy 0.1000",
            "epoch 2/2, step 14/14 (100 %), loss 11.00, eval/accuracy 0.2000",
            "epoch 2/2, step 14/14 (100 %), loss 11.00, eval/accuracy 0.2000",
        ]

    def test_epoch_without_logging_point_has_a_line(self, log: pytest.LogCaptureFixture) -> None:
        """The line comes before the next epoch, with earlier values."""
        bar = ProgressBarHookConfig(refresh_seconds=NO_STEP)
        make_trainer([bar, MetricsLoggerConfig(every=EverySteps(5)), Publisher()], max_epoch=2)()
        assert values_of(log) == [
            "epoch 1/2, step  7/14 (50 %), loss 3.0000",
            "epoch 2/2, step 14/14 (100 %), loss 12.50, eval/accuracy 0.2000",
            "epoch 2/2, step 14/14 (100 %), loss 12.50, eval/accuracy 0.2000",
        ]

    def test_resumed_run_shows_earlier_values(
        self, log: pytest.LogCaptureFixture, tmp_path: Path
    ) -> None:
        """The loss of the last logging point is shown from the start."""
        hooks = [ProgressBarHookConfig(refresh_seconds=EVERY_STEP), MetricsLoggerConfig()]
        given_up = make_trainer([*hooks, Publisher()], max_epoch=1)
        given_up()
        given_up.save_checkpoint(tmp_path / "saved")
        log.clear()
        make_trainer([*hooks, Publisher()], max_step=9, resume_from=tmp_path / "saved")()
        assert "run: 9 steps, resumed after step 7, from saved" in log.messages
        assert values_of(log)[0] == ("epoch 2, step 8/9 (88 %), loss 4.0000, eval/accuracy 0.1000")

    def test_failure_in_an_evaluation(self, log: pytest.LogCaptureFixture) -> None:
        """The evaluation's error propagates, and the last line has the completed steps."""

        class Failing(Publisher):
            def evaluate(self, args: PipelineHookArgs) -> None:
                raise RuntimeError("out of luck")

        bar = ProgressBarHookConfig(metrics=["eval/accuracy"], refresh_seconds=NO_STEP)
        with pytest.raises(RuntimeError, match="out of luck"):
            make_trainer([bar, MetricsLoggerConfig(), Failing()], max_epoch=2)()
        (line,) = lines_of(log)
        assert line == "epoch 2/2, step  7/14 (50 %), loss L, N samples/s, stopped after T"

    def test_bar_is_redrawn_at_a_logging_point(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """New values are shown at once, also with a long interval."""
        with a_terminal(monkeypatch) as terminal:
            drawn: list[str] = []
            pause = AtStep(4, lambda args: time.sleep(0.06))
            pause.name = "pause"
            look = AtStep(5, lambda args: drawn.append(terminal.screen()[-1]))
            bar = ProgressBarHookConfig(refresh_seconds=NO_STEP)
            logger = MetricsLoggerConfig(every=EverySteps(5))
            make_trainer([bar, logger, Publisher(), pause, look], max_epoch=1)()
            assert re.match(r"epoch 1/1  step 5/7  ━+.*  loss 3\.0000  [\d,]+ samples/s", drawn[0])
            assert "    1     7     6.5000" in terminal.screen()[-4]


class CountingReads(torch.Tensor):
    """Tensor that counts conversions to a number, and copies to another tensor."""

    reads = copies = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.item, torch.Tensor.__float__):
            cls.reads += 1
        cls.copies += func is torch.Tensor.copy_
        # torch does not annotate it.
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def test_loss_is_read_only_when_shown() -> None:
    """Steps between two updates never copy the loss to the host, and none waits for it."""

    def forward(model: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        outputs, loss = loss_of(model, batch)
        return outputs, loss.as_subclass(CountingReads)

    CountingReads.reads = CountingReads.copies = 0
    make_trainer(
        ProgressBarHookConfig(refresh_seconds=NO_STEP),
        batch_processor=SimpleBatchProcessor.from_callable(forward),
        max_epoch=3,
    )()
    assert CountingReads.copies == 3 + 1  # each end of an epoch, and of the run
    assert CountingReads.reads == 0


def test_bar_reads_nothing_with_logging_points() -> None:
    """With a logging point and an update in every step, only the first loss is copied."""

    def forward(model: Any, batch: Any) -> tuple[Any, torch.Tensor]:
        outputs, loss = loss_of(model, batch)
        return outputs, loss.as_subclass(CountingReads)

    hooks = PipelineHooks()
    hooks.on_step.after(lambda args: args.metrics.publish("loss/total", args.loss))
    hooks.on_step.after(lambda args: args.metrics.publish("lift", args.loss))
    CountingReads.reads = CountingReads.copies = 0
    bar = ProgressBarHookConfig(metrics=["lift"], refresh_seconds=EVERY_STEP)
    make_trainer(
        [bar, MetricsLoggerConfig(every=EverySteps(1)), hooks],
        batch_processor=SimpleBatchProcessor.from_callable(forward),
        max_epoch=2,
    )()
    assert (CountingReads.reads, CountingReads.copies) == (0, 1)


def test_bar_does_not_change_weights() -> None:
    """Showing the progress does not change the training."""
    with_bar, without = make_model(), make_model()
    make_trainer(ProgressBarHookConfig(refresh_seconds=EVERY_STEP), model=with_bar, max_epoch=2)()
    make_trainer(model=without, max_epoch=2)()
    for one, other in zip(with_bar.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)


@given(
    max_step=st.none() | st.integers(1, 30),
    max_optimizer_step=st.none() | st.integers(1, 30),
    max_epoch=st.integers(1, 5),
    steps_per_epoch=st.integers(1, 9),
    window=st.integers(1, 4),
)
def test_remaining_steps_are_exact(
    max_step: int | None,
    max_optimizer_step: int | None,
    max_epoch: int,
    steps_per_epoch: int,
    window: int,
) -> None:
    """Before each step, the remaining steps are those of a plain loop."""
    limits = TrainerLimits(max_step, max_optimizer_step, max_epoch)
    progress = TrainerProgress()
    remaining = []
    while not limits.reached(progress):
        for step in range(steps_per_epoch):
            remaining.append(remaining_steps(limits, progress, steps_per_epoch, window))
            progress.finish_step()
            if (step + 1) % window == 0 or step + 1 == steps_per_epoch:
                progress.finish_optimizer_step(committed=True)
            if limits.reached(progress):
                break
        if progress.step_id == steps_per_epoch:
            progress.finish_epoch()
    assert remaining == list(range(len(remaining), 0, -1))
    assert remaining_steps(limits, progress, steps_per_epoch, window) == 0


def test_remaining_steps_without_a_length() -> None:
    """Without a length, epochs can't be converted to steps, but updates can."""
    progress = TrainerProgress(step_id=4, global_step_id=4, optimizer_step_id=1)
    assert remaining_steps(TrainerLimits(max_epoch=2), progress, None, 3) is None
    assert remaining_steps(TrainerLimits(max_optimizer_step=3), progress, None, 3) == 5


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((0.0, "0.0000"), (0.4231, "0.4231"), (-1.5, "-1.5000"), (123.456, "123.46")),
        *((3.2e-4, "3.200e-04"), (1.25e6, "1.250e+06"), (float("nan"), "nan")),
    ],
)
def test_numbers_keep_their_width(value: float, shown: str) -> None:
    """A value has four decimals while they are significant."""
    assert RunStatus(1, None, 0, None, {"loss": value}).measurements == [f"loss {shown}"]


def test_slow_rates_and_long_times() -> None:
    """A rate below ten has decimals, and hours are not converted to days."""
    status = RunStatus(1, None, 3, 9, {}, samples_per_s=0.254, seconds_left=3600 * 51 + 62)
    assert [*status.rate, *status.time] == ["0.25 samples/s", "ETA 51:01:02"]


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (120, "epoch 2/5  step  34/115  BAR  loss 0.4231  512 samples/s  ETA 0:00:41"),
        (80, "epoch 2/5  step  34/115  BAR  loss 0.4231  512 samples/s  ETA 0:00:41"),
        (65, "epoch 2/5  step  34/115  BAR  loss 0.4231  ETA 0:00:41"),
        (55, "epoch 2/5  step  34/115  loss 0.4231  ETA 0:00:41"),
        (40, "epoch 2/5  step  34/115  loss 0.4231"),
        (30, "step  34/115  loss 0.4231"),
        (20, "step  34/115"),
    ],
)
def test_bar_is_one_line(width: int, shown: str) -> None:
    """The bar is one line, with room for ``^C``; texts without room are left out, not cut."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    values = {"loss": 0.4231, "grad_norm": 1.25}
    status = RunStatus(2, 5, 34, 115, values, 512.3, 12.0, seconds_left=41.0)
    with console.capture() as captured:
        console.print(_BarLine(status))
    (line,) = captured.get().splitlines()
    assert len(line.rstrip()) <= width - 3
    assert re.sub(r"━+╸? +", "BAR  ", line.rstrip()) == shown


class Terminal(io.StringIO):
    """Terminal that records its output and can disappear."""

    gone = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().write(text)

    def screen(self) -> list[str]:
        """Return the text that a tall terminal shows for rich's control codes."""
        return screen(self.getvalue())


def screen(written: str) -> list[str]:
    """Return the text that a tall terminal shows for rich's control codes."""
    rows, row, column = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[?\d;]*[A-Za-z]|\r|\n)|([^\x1b\r\n]+)", written):
        if text:
            rows[row] = rows[row][:column].ljust(column) + text + rows[row][column + len(text) :]
            column += len(text)
        elif code == "\n":  # as a terminal driver sends it: with a return
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif code == "\r":
            column = 0
        elif code.endswith("A"):
            row -= int(code[2:-1] or 1)
        elif code.endswith("K"):
            rows[row] = ""
        else:
            assert code.endswith(("m", "h", "l")), repr(code)  # colours; the cursor's looks
    return [line.rstrip() for line in rows if line.strip()]


@contextmanager
def a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Make standard output and error one terminal of 80 columns."""
    opened = Terminal()
    with monkeypatch.context() as patch:
        for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            patch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", opened)
        patch.setattr(sys, "stderr", opened)
        rich.reconfigure()  # a console checks its terminal once, at construction
        yield opened
        assert sys.stdout is sys.stderr is opened  # restored
    rich.reconfigure()


class TestBar:
    """Output to a terminal."""

    def test_final_status_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A finished run leaves header, aligned lines and result, and no bar."""
        with a_terminal(monkeypatch) as terminal:
            make_trainer(ProgressBarHookConfig(), max_epoch=2)()
            shown = [re.sub(r"\d\.\d{4}", "L.LLLL", line) for line in terminal.screen()]
            shown = [re.sub(r" +[\d,]+( samples/s|$)", r" N\1", line) for line in shown]
            assert shown == [
                "model  Sequential, 58 parameters, on cpu",
                "data   TensorDataset, 28 samples, 7 steps an epoch",
                "run    2 epochs, 14 steps, new",
                "epoch  step       loss         lr  samples/s",
                "    1     7     L.LLLL   1.00e-01 N",
                "    2    14     L.LLLL   1.00e-01 N",
                "completed after 14 steps in 0:00:00, N samples/s",
                shown[-1],
            ]
            assert re.fullmatch(r"  loss  L\.LLLL  [▁-█]{3}", shown[-1])

    def test_bar_is_redrawn_at_its_interval(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each step is drawn if the interval is shorter than a step; otherwise only few."""
        with a_terminal(monkeypatch) as terminal:
            make_trainer(ProgressBarHookConfig(refresh_seconds=EVERY_STEP), max_epoch=2)()
            drawn = re.findall(r"step +(\d+)/14", terminal.getvalue())
            assert list(dict.fromkeys(drawn)) == [str(step) for step in range(15)]

    def test_other_output_stays_intact(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Printed, logged and warning lines appear above the bar, unbroken."""
        with a_terminal(monkeypatch) as terminal:
            kept = logging.StreamHandler(sys.stderr)  # as logging.basicConfig makes it
            elsewhere = logging.StreamHandler(io.StringIO())
            other = logging.getLogger("other")
            other.addHandler(kept)
            other.addHandler(elsewhere)

            def talk(args: PipelineHookArgs) -> None:
                print("printed")
                print("half", end="")
                print(" and half")
                print("to stderr", file=sys.stderr)
                other.warning("logged [bold]as it is[/bold]")

            try:
                make_trainer(
                    [ProgressBarHookConfig(refresh_seconds=EVERY_STEP), AtStep(3, talk)],
                    max_epoch=1,
                )()
                other.warning("logged later")
            finally:
                other.removeHandler(kept)
                other.removeHandler(elsewhere)
            *_, last = shown = terminal.screen()
            assert shown[3:7] == [
                "printed",
                "half and half",
                "to stderr",
                "logged [bold]as it is[/bold]",
            ]
            assert last == "logged later"
            assert kept.stream is terminal
            assert elsewhere.stream.getvalue().count("\n") == 2

    def test_error_restores_the_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After an error, one line has the last step, and streams are restored."""
        with a_terminal(monkeypatch) as terminal:
            trainer = make_trainer([ProgressBarHookConfig(), AtStep(9, fail)], max_epoch=2)
            with pytest.raises(RuntimeError, match="out of luck"):
                trainer()
            assert re.fullmatch(r"failed after 9 of 14 steps in 0:00:0\d", terminal.screen()[-1])
            assert "\x1b[?25h" in terminal.getvalue().rpartition("\x1b[?25l")[2]  # the cursor

    def test_incomplete_line_is_not_lost(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Text printed without a newline before the bar closes is shown."""
        with a_terminal(monkeypatch) as terminal:
            talk = AtStep(6, lambda args: print("no line's end", end=""))
            make_trainer([ProgressBarHookConfig(), talk], max_epoch=1)()
            assert "no line's end" in terminal.screen()

    def test_terminal_may_disappear(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The run finishes if the terminal closes during the run."""
        with a_terminal(monkeypatch) as terminal:

            def go(args: PipelineHookArgs) -> None:
                terminal.gone = True

            trainer = make_trainer(
                [ProgressBarHookConfig(refresh_seconds=EVERY_STEP), AtStep(3, go)], max_epoch=2
            )
            trainer()
            assert trainer.progress.global_step_id == 14

    def test_another_live_display_keeps_the_terminal(
        self, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
    ) -> None:
        """There are lines instead of a second bar if rich draws another display already."""
        with a_terminal(monkeypatch) as terminal:
            with Live("mine", auto_refresh=False):
                make_trainer(ProgressBarHookConfig(), max_epoch=1)()
            assert lines_of(log)[-1].startswith("epoch 1/1, step 7/7")
            assert "━" not in terminal.getvalue()

    def test_plain_shows_lines(
        self, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
    ) -> None:
        """A terminal gets lines with plain=True, and nothing is redirected."""
        with a_terminal(monkeypatch) as terminal:
            seen: list[object] = []
            look = AtStep(2, lambda args: seen.append(sys.stdout))
            make_trainer([ProgressBarHookConfig(plain=True), look], max_epoch=1)()
            assert lines_of(log)[-1].startswith("epoch 1/1, step 7/7")
            assert seen == [terminal]

    def test_lines_without_rich(
        self, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
    ) -> None:
        """Without rich, a terminal gets lines and the command to install rich."""
        monkeypatch.setitem(sys.modules, "rich", None)
        with a_terminal(monkeypatch):
            make_trainer(ProgressBarHookConfig(), max_epoch=1)()
        assert log.messages[0].endswith('pip install "robo-orchard-hooks[terminal]"')
        assert lines_of(log)[-1].startswith("epoch 1/1, step 7/7")

    def test_only_a_terminal_is_redirected(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The bar is drawn on standard error if standard output is a file."""
        with a_terminal(monkeypatch) as terminal:
            file = io.StringIO()
            talk = AtStep(3, lambda args: print("a result"))
            with redirect_stdout(file):
                make_trainer([ProgressBarHookConfig(), talk], max_epoch=1)()
            assert file.getvalue() == "a result\n"
            assert "epoch 1/1  step 1/7" in terminal.getvalue()


class Evaluator(Publisher):
    """Publishes a falling, then a rising error in `eval/error`."""

    published_metrics = ("loss/total", "eval/error")

    def evaluate(self, args: PipelineHookArgs) -> None:
        args.metrics.publish("eval/error", [0.0, 0.5, 0.2, 0.4, 0.3][args.epoch_id])


def test_the_result_of_a_resumed_run_is_of_the_complete_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The best value of a metric may be from before the resume; the loss has its complete curve."""
    hooks: list[Any] = [ProgressBarHookConfig(), MetricsLoggerConfig(), Evaluator()]
    given_up = make_trainer(hooks, max_epoch=2)
    given_up()
    given_up.save_checkpoint(tmp_path / "saved")
    with a_terminal(monkeypatch) as terminal:
        make_trainer([*hooks[:2], Evaluator()], max_epoch=4, resume_from=tmp_path / "saved")()
        shown = terminal.screen()
    assert "run    4 epochs, 28 steps, resumed after step 14, from saved" in shown
    assert re.fullmatch(r"  loss +25\.00  ▁▃▆█", shown[-2])
    assert shown[-1] == "  eval/error  0.3000  best 0.2000 at step 14"


@pytest.mark.parametrize("is_hidden", [True, False])
def test_the_result_covers_hidden_steps_or_states_the_first_one(
    is_hidden: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Values of a hidden start count; without the hook at the start, the result says since when."""
    hooks: list[Any] = [ProgressBarHookConfig(), MetricsLoggerConfig()]
    monkeypatch.setattr(logging.getLogger("robo_orchard_lab"), "level", logging.WARNING)
    given_up = make_trainer([*hooks[not is_hidden :], Evaluator()], max_epoch=2)
    given_up()
    given_up.save_checkpoint(tmp_path / "saved")
    monkeypatch.undo()
    with a_terminal(monkeypatch) as terminal:
        make_trainer([*hooks, Evaluator()], max_epoch=4, resume_from=tmp_path / "saved")()
        shown = terminal.screen()[-1]
    since = "" if is_hidden else ", known since step 14"
    assert shown == f"  eval/error  0.3000  best 0.2000 at step 14{since}"


def test_a_new_column_has_a_new_heading() -> None:
    """A metric that is first measured later gets a column; missing values are blank."""
    lines = AlignedLines()
    first = lines.of(RunStatus(1, 5, 10, 50, {"loss": 0.5, "lr": 1e-3}), 80)
    second = lines.of(RunStatus(2, 5, 20, 50, {"loss": 0.4, "eval/x": 2.0, "lr": 1e-3}), 80)
    third = lines.of(RunStatus(3, 5, 30, 50, {"loss": 0.3, "lr": 1e-4}), 80)
    assert [text.split() for _, text in (*first, *second, *third)] == [
        ["epoch", "step", "loss", "lr", "samples/s"],
        ["1", "10", "0.5000", "1.00e-03"],
        ["epoch", "step", "loss", "x", "lr", "samples/s"],
        ["2", "20", "0.4000", "2.0000", "1.00e-03"],
        ["3", "30", "0.3000", "1.00e-04"],
    ]
    assert len({len(text) for _, text in (*second, *third)}) == 1


def test_the_log_level_of_the_package_hides_the_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is printed with a level above INFO of ``robo_orchard_lab``, also without handlers."""
    monkeypatch.setattr(logging.getLogger("robo_orchard_lab"), "level", logging.WARNING)
    make_trainer(ProgressBarHookConfig(refresh_seconds=EVERY_STEP), max_epoch=1)()
    assert capsys.readouterr() == ("", "")


SCRIPT = """
import torch
from accelerate import Accelerator
from robo_orchard_lab.pipeline import HookBasedTrainer, SimpleBatchProcessor
from robo_orchard_lab.pipeline.hooks import ProgressBarHookConfig
from robo_orchard_lab.utils import log_basic_config

log_basic_config()
accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(4, 1)
batches = [torch.ones(8, 4)] * 7
HookBasedTrainer(
    accelerator,
    model,
    batches,
    SimpleBatchProcessor.from_callable(lambda model, batch: (None, model(batch).mean())),
    torch.optim.SGD(model.parameters(), lr=0.1),
    hooks=ProgressBarHookConfig(),
    max_epoch=2,
)()
print("after")
"""


def test_in_a_real_terminal(tmp_path: Path) -> None:
    """A process in a pseudo-terminal leaves its result, with later output below."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    here, there = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, script], stdin=there, stdout=there, stderr=there, env=environment
    )
    os.close(there)
    written = b""
    while True:
        try:
            part = os.read(here, 4096)
        except OSError:  # on Linux, the other end is closed
            break
        if not part:
            break
        written += part
    os.close(here)
    assert process.wait() == 0, written.decode()
    *_, verdict, loss, after = screen(written.decode().replace("\r\n", "\n"))
    assert verdict.startswith("completed after 14 steps in 0:00:0")
    assert re.fullmatch(r"  loss  -?\d\.\d{4}  [▁-█]+", loss)
    assert after == "after"


def test_only_the_main_process_shows_progress(tmp_path: Path) -> None:
    """One of two processes writes the lines, with the samples/s of both."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    finished = launch(script)
    assert finished.stdout.count("after") == 2  # both may write into one line
    lines = [line for line in finished.stderr.splitlines() if "samples/s" in line]
    assert len(lines) == 3
    assert all("[rank 0/2]" in line for line in lines)


def test_first_bar_does_not_change_the_rng(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing rich with the first bar leaves Python's RNG state unchanged."""
    for name in [*sys.modules]:
        if name.partition(".")[0] == "rich":
            monkeypatch.delitem(sys.modules, name)
    with a_terminal(monkeypatch):
        assert_weights_unchanged(ProgressBarHookConfig(), steps=2)
    assert "rich" in sys.modules
