"""Signals that save and stop a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # accelerate brings it
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from launching import HELPERS
from robo_orchard_lab.pipeline import HookBasedTrainer, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.data.workers import IgnoreSignals, ignore_signals_in_workers
from robo_orchard_lab.pipeline.errors import (
    PipelineConfigError,
    PipelineStateError,
    RunPreempted,
)
from robo_orchard_lab.pipeline.hooks import (
    LossTrackerConfig,
    MetricsLoggerConfig,
    PreemptionConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.metrics import MetricValue
from robo_orchard_lab.pipeline.run.run_state import read_run_state
from robo_orchard_lab.testing import assert_no_device_sync, assert_weights_unchanged
from tiny import equal, make_model, make_trainer, weights


def send(number: int = signal.SIGTERM) -> None:
    """Send a signal to this process, to be handled by the main thread."""
    os.kill(os.getpid(), number)


def send_to_all(number: int = signal.SIGTERM) -> None:
    """Send a signal to the workers and this process, as to a process group.

    Python's resource tracker is excluded: it belongs to the complete test session, and if it dies,
    the next user of shared memory gets a warning.
    """
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # just ended
            if not any("resource_tracker" in part for part in child.cmdline()):
                child.send_signal(number)
    send(number)


class Saver(PipelineHooks):
    """Hook that records the step and the reason of save requests."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[tuple[int, str]] = []
        self.on_loop.before(self._open)

    def _open(self, args: PipelineHookArgs) -> None:
        args.run.savers[self.name] = lambda requests: self.save(args, requests)

    def save(self, args: PipelineHookArgs, requests: Any) -> None:
        assert not args.progress.in_step
        self.saved.append((args.global_step_id, str(requests)))

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.saved]


def planted(channel: str, role: str, do: Callable[[PipelineHookArgs], Any]) -> PipelineHooks:
    hooks = PipelineHooks(f"planted on {channel}")
    getattr(getattr(hooks, channel), role)(do)
    return hooks


def sends_at(step: int, channel: str = "on_step", role: str = "after") -> PipelineHooks:
    """Return a hook that sends SIGTERM in one step, counted from 1."""

    def maybe(args: PipelineHookArgs) -> None:
        if args.progress.steps_done == step:
            send()

    return planted(channel, role, maybe)


def preempted(hooks: Any, *, code: int = 143, **options: Any) -> Saver:
    """Run until a signal stops the trainer; return the saves."""
    saver = Saver()
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    options = {"max_epoch": 3, **options}
    with pytest.raises(RunPreempted) as stopped:
        make_trainer([PreemptionConfig(), saver, *hooks], **options)()
    assert stopped.value.code == code
    before.pop(signal.SIGCHLD)  # torch's, for its workers
    assert {number: signal.getsignal(number) for number in before} == before
    return saver


def test_signal_in_a_step_saves_after_the_step(tmp_path: Path) -> None:
    """The step is the last one and is saved; run_state.json has the hook and the reason."""
    saver = preempted([sends_at(3)], run_folder=tmp_path)
    assert saver.steps == [3]
    assert "received SIGTERM" in saver.saved[0][1]
    state = read_run_state(tmp_path)
    assert (state.state, state.exit_code) == ("preempted", 143)
    assert (state.by, state.reason) == ("Preemption", "received SIGTERM")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_exit_code_follows_the_signal(name: str, code: int) -> None:
    """The exit code is 128 plus the signal's number, as in a shell."""
    number = signal.Signals[name]

    def maybe(args: PipelineHookArgs) -> None:
        if args.global_step_id == 1:
            send(number)

    assert preempted([planted("on_batch", "before", maybe)], code=code).steps == [2]


def test_custom_exit_code() -> None:
    """A configured exit code is used, for schedulers that restart by exit code."""
    with pytest.raises(RunPreempted) as stopped:
        make_trainer([PreemptionConfig(exit_code=75), Saver(), sends_at(3)], max_step=9)()
    assert stopped.value.code == 75


def test_an_ignored_interrupt_stays_ignored() -> None:
    """A background job is not stopped by Ctrl-C in its terminal."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupts = planted("on_batch", "before", lambda args: send(signal.SIGINT))
        trainer = make_trainer([PreemptionConfig(), Saver(), interrupts], max_step=9)
        trainer()
        assert trainer.progress.global_step_id == 9
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_saving() -> None:
    """The run just stops with save_checkpoint=False."""
    trainer = make_trainer([PreemptionConfig(save_checkpoint=False), sends_at(3)], max_step=9)
    with pytest.raises(RunPreempted):
        trainer()
    assert trainer.progress.global_step_id == 3


@pytest.mark.parametrize(
    ("channel", "role", "steps"),
    [
        ("on_loop", "before", [1]),  # registered after Preemption
        ("on_epoch", "before", [1]),
        ("on_epoch", "after", [8]),  # 7 batches per epoch
        ("on_model_forward", "before", [1]),
        ("on_optimizer_step", "after", [1]),
    ],
)
def test_signal_between_steps(channel: str, role: str, steps: list[int]) -> None:
    """The run stops at the commit point of the next step."""
    sent: list[int] = []

    def once(args: PipelineHookArgs) -> None:
        if not sent:
            sent.append(1)
            send()

    assert preempted([planted(channel, role, once)]).steps == steps


def test_signal_in_the_last_step_of_an_epoch() -> None:
    """The epoch is completed and counted before the save."""
    epochs: list[int] = []
    saver = Saver()
    saver.save = lambda args, requests: epochs.append(args.epoch_id)  # type: ignore[method-assign]
    with pytest.raises(RunPreempted):
        make_trainer([PreemptionConfig(), saver, sends_at(7)], max_epoch=3)()
    assert epochs == [1]


def test_signal_after_the_last_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run is completed, not preempted; the signal is logged."""
    hook = planted("on_loop", "after", lambda args: send())
    make_trainer([PreemptionConfig(), Saver(), hook], max_step=3, run_folder=tmp_path)()
    assert read_run_state(tmp_path).state == "completed"
    assert "received SIGTERM after the last step" in caplog.text


def test_signal_during_a_save() -> None:
    """The save is completed, and one more step is made."""
    saver = Saver()
    plain = saver.save
    sent: list[int] = []

    def save(args: PipelineHookArgs, requests: Any) -> None:
        if not sent:
            sent.append(1)
            send()
            time.sleep(0.05)
        plain(args, requests)

    saver.save = save  # type: ignore[method-assign]
    asks = PipelineHooks("asks")
    asks.on_step.after(when="at steps 3")(lambda args: args.requests.save("it is time"))
    with pytest.raises(RunPreempted):
        make_trainer([PreemptionConfig(), saver, asks], max_step=9)()
    assert saver.steps == [3, 4]


def test_signal_in_the_last_step_completes_the_run(tmp_path: Path) -> None:
    """A signal in the last step changes nothing, with or without a save at the end."""
    preemption, save = PreemptionConfig(save_checkpoint=False), SaveCheckpointConfig(every=None)
    make_trainer([preemption, save, sends_at(3)], max_step=3, run_folder=tmp_path)()
    state = read_run_state(tmp_path)
    assert (state.state, state.reason, state.by) == ("completed", None, None)
    assert state.checkpoint is not None
    assert state.checkpoint.step == 3


class Samples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Dataset with one sample that waits for the signal."""

    def __init__(self, signalled: Path | None = None) -> None:
        self.signalled = signalled

    def __len__(self) -> int:
        return 28

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 13 and self.signalled is not None:
            self.signalled.with_suffix(".awaited").touch()
            wait_until(self.signalled.exists)
        return torch.full((4,), index / 28), torch.zeros(2)


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """The dataset as a stream."""

    def __init__(self, signalled: Path) -> None:
        self.samples = Samples(signalled)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return (self.samples[index] for index in range(len(self.samples)))


def wait_until(happened: Callable[[], bool]) -> None:
    end_at = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end_at
        time.sleep(0.01)


@contextmanager
def signal_when_awaited(
    signalled: Path,
    number: int = signal.SIGTERM,
    also: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Send a signal to all processes while the sample is awaited, then release the sample."""

    def send_it() -> None:
        wait_until(lambda: signalled.with_suffix(".awaited").exists() and also())
        time.sleep(0.05)  # the main thread waits, too
        send_to_all(number)
        signalled.touch()

    thread = threading.Thread(target=send_it)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize(
    ("kind", "workers", "number", "context"),
    [
        (Samples, 0, signal.SIGTERM, None),
        (Samples, 2, signal.SIGTERM, "fork"),
        (Samples, 2, signal.SIGINT, "fork"),
        (Samples, 2, signal.SIGUSR1, "fork"),
        (Samples, 1, signal.SIGTERM, "spawn"),
        (Stream, 1, signal.SIGTERM, "fork"),
    ],
)
def test_signal_while_waiting_for_data(
    kind: Callable[[Path], Dataset[Any]],
    workers: int,
    number: signal.Signals,
    context: str | None,
    tmp_path: Path,
) -> None:
    """Workers survive a signal to all processes; the batch arrives and is the last one."""
    signalled = tmp_path / "signalled"
    loader = DataLoader(
        kind(signalled), batch_size=4, num_workers=workers, multiprocessing_context=context
    )
    saver, done = Saver(), threading.Event()

    def report(args: PipelineHookArgs) -> None:
        if args.global_step_id == 2:  # all steps before the awaited batch
            done.set()

    hooks: list[Any] = [planted("on_step", "after", report), PreemptionConfig(), saver]
    with (
        signal_when_awaited(signalled, number, also=done.is_set),
        pytest.raises(RunPreempted) as stopped,
    ):
        make_trainer(hooks, loader=loader, max_epoch=3)()
    assert stopped.value.code == 128 + number
    assert saver.steps == [4]
    assert loader.worker_init_fn is None  # as it was


def test_second_sigterm_ends_a_worker() -> None:
    """torch ends hanging workers by a second SIGTERM."""
    others = psutil.Process().children()
    loader = DataLoader(Samples(), num_workers=1, worker_init_fn=IgnoreSignals(None))
    with ignore_signals_in_workers([signal.SIGTERM, signal.SIGINT]):
        batches = iter(loader)
        next(batches)
    (worker,) = (child for child in psutil.Process().children() if child not in others)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
        worker.send_signal(number)
        next(batches)
    assert worker.is_running()
    with pytest.raises(RuntimeError, match="killed by signal: Terminated"):
        end_and_wait(worker)


def end_and_wait(worker: psutil.Process) -> None:
    worker.send_signal(signal.SIGTERM)
    time.sleep(5)  # interrupted by the worker's end


SCRIPT_WITH_WORKERS = """
from robo_orchard_lab.pipeline.hooks import PreemptionConfig
from tiny import make_loader, make_trainer

loader = make_loader(num_workers=2, persistent_workers=True)
trainer = make_trainer(PreemptionConfig(save_checkpoint=False), loader=loader, max_epoch=2)
trainer()
"""


ANOTHER_TRAINER = """
other = make_trainer(PreemptionConfig(save_checkpoint=False), loader=make_loader(), max_epoch=1)
other()
"""


@pytest.mark.parametrize(
    ("last", "code"), [("", 0), ("raise ValueError('planted')", 1), (ANOTHER_TRAINER, 0)]
)
def test_script_exits_with_persistent_workers(last: str, code: int) -> None:
    """The script exits also if loader and trainer stay alive, after errors and a second run."""
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT_WITH_WORKERS + last],
        cwd=HELPERS,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == code, ended.stderr
    assert "killed by signal" not in ended.stderr


def test_worker_init_fn_is_kept() -> None:
    """The user's worker_init_fn takes precedence."""
    ready = torch.zeros(1).share_memory_()

    def start(worker_id: int) -> None:
        ready.add_(1)

    loader = DataLoader(Samples(), batch_size=4, num_workers=1, worker_init_fn=start)
    preempted([sends_at(2)], loader=loader)
    assert ready.item() == 1
    assert loader.worker_init_fn is start


@pytest.mark.parametrize("workers", [0, 2])
def test_signal_during_an_evaluation(workers: int, tmp_path: Path) -> None:
    """The evaluation completes with its value, and one more step is made."""
    signalled = tmp_path / "signalled"
    loader = DataLoader(Samples(signalled), batch_size=4, num_workers=workers)
    validation = ValidationHookConfig(every="at steps 2")(dataloaders={"val": loader})
    found: list[MetricValue] = []
    listens = planted(
        "on_loop", "before", lambda args: args.metrics.subscribe("eval/val/loss", found.append)
    )
    with signal_when_awaited(signalled):
        saver = preempted([validation, listens])
    assert saver.steps == [3]
    assert [value.step for value in found] == [2]


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    """Half a second later, a second signal leaves the open step without saving."""

    before = signal.getsignal(signal.SIGTERM)

    def wait(args: PipelineHookArgs) -> None:
        if args.global_step_id == 2:
            send()
            send()  # the same request, as from a launcher
            assert signal.getsignal(signal.SIGTERM) is not before
            time.sleep(0.5)
            try:
                send(signal.SIGINT)
                time.sleep(60)
            finally:  # the third one has its default effect
                assert signal.getsignal(signal.SIGTERM) is before

    begun_at = time.monotonic()
    assert preempted([planted("on_step", "after", wait)], code=130, run_folder=tmp_path).steps == []
    assert time.monotonic() - begun_at < 30
    state = read_run_state(tmp_path)
    assert (state.state, state.exit_code) == ("preempted", 130)
    assert state.reason == "received SIGTERM, and a second signal to stop at once"
    assert state.by == "Preemption"


def test_handlers_are_restored_after_an_error() -> None:
    """Earlier handlers are restored after the loop, also if a hook fails."""
    mine = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        handler = signal.getsignal(signal.SIGUSR1)

        def fail(args: PipelineHookArgs) -> None:
            assert signal.getsignal(signal.SIGUSR1) is not handler
            raise ValueError("planted")

        for channel in ("on_loop", "on_step"):
            with pytest.raises(ValueError, match="planted"):
                make_trainer(
                    [PreemptionConfig(), Saver(), planted(channel, "before", fail)], max_step=2
                )()
            assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, mine)


def test_other_signals_are_not_handled() -> None:
    """Only configured signals are handled."""
    kept = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []
    watch = planted("on_step", "before", lambda args: seen.append(signal.getsignal(signal.SIGINT)))
    make_trainer([PreemptionConfig(signals=("SIGTERM",)), Saver(), watch], max_step=1)()
    assert seen == [kept]


def test_forked_process_is_not_affected() -> None:
    """A forked process ends by the signal, as without the hook."""
    ends: list[int] = []

    def fork(args: PipelineHookArgs) -> None:
        child = os.fork()
        if child == 0:  # pragma: no cover - in another process
            send()
            time.sleep(10)
            os._exit(0)
        ends.append(os.waitpid(child, 0)[1])

    make_trainer([PreemptionConfig(), Saver(), planted("on_step", "before", fork)], max_step=1)()
    assert os.WTERMSIG(ends[0]) == signal.SIGTERM


def test_other_thread_is_refused() -> None:
    """Python handles signals only in the main thread."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            make_trainer([PreemptionConfig(), Saver()], max_step=1)()
        except PipelineStateError as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="worker")
    thread.start()
    thread.join()
    assert "Preemption: signals need the main thread" in str(errors)
    assert "the trainer runs in 'worker'" in str(errors)


def test_missing_saver_is_refused_at_the_start() -> None:
    """The error comes before the first step, not with the signal."""
    with pytest.raises(PipelineConfigError, match="register a SaveCheckpoint, or set save_check"):
        make_trainer(PreemptionConfig(), max_step=1)()


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        (("SIGTEM",), "no signal 'SIGTEM'"),
        (("SIGKILL",), "SIGKILL can't be handled"),
        ((), "at least 1"),
    ],
)
def test_invalid_signals_are_refused(signals: tuple[str, ...], message: str) -> None:
    """Unknown and unsupported signals are refused when the config is built."""
    with pytest.raises(ValueError, match=message):
        PreemptionConfig(signals=signals)


def test_hook_does_not_affect_training() -> None:
    """The hook changes no weights and reads no tensors."""
    hook = PreemptionConfig(save_checkpoint=False)
    assert_weights_unchanged(hook)
    assert_no_device_sync(hook)


class Remembers(PipelineHooks):
    """Hook that sends a signal while its state is saved for the first time."""

    def __init__(self, sends: bool) -> None:
        super().__init__()
        self.sends = sends
        self.on_step.after(when="at steps 4")(lambda args: args.requests.save("it is time"))

    def state_dict(self) -> dict[str, Any]:
        if self.sends:
            self.sends = False
            send_to_all()
        return {}


@pytest.mark.parametrize(
    ("place", "workers"), [("step", 0), ("save", 2), ("data", 2), ("data", 0), ("evaluation", 2)]
)
def test_preempted_run_resumes_exactly(place: str, workers: int, tmp_path: Path) -> None:
    """The resumed run is bit-identical, within a window and within an epoch."""

    signalled = tmp_path / "signalled"

    def train(folder: str, sends: bool, **options: Any) -> HookBasedTrainer:
        awaits = {place: Samples(signalled) if sends else Samples()}
        data, val = awaits.get("data", Samples()), awaits.get("evaluation", Samples())
        validation = ValidationHookConfig(every="at steps 5")
        hooks: list[Any] = [
            PreemptionConfig(),
            SaveCheckpointConfig(every=None),
            validation(dataloaders={"val": DataLoader(val, batch_size=4, num_workers=workers)}),
            Remembers(sends and place == "save"),
        ]
        if sends and place == "step":
            hooks.append(sends_at(5))
        return make_trainer(
            hooks,
            model=torch.nn.Sequential(make_model(), torch.nn.Dropout(0.5)),
            loader=DataLoader(data, batch_size=4, shuffle=True, num_workers=workers),
            accumulate=3,
            max_epoch=2,
            run_folder=tmp_path / folder,
            **options,
        )

    uninterrupted = train("uninterrupted", sends=False)
    uninterrupted()
    stopped = train("stopped", sends=True)
    awaited = place in ("data", "evaluation")
    with (
        signal_when_awaited(signalled) if awaited else nullcontext(),
        pytest.raises(RunPreempted),
    ):
        stopped()
    assert 1 <= stopped.progress.global_step_id < 14
    resumed = train("stopped", sends=False, resume_from="auto")
    assert resumed.progress == stopped.progress
    resumed()
    assert equal(weights(resumed.model), weights(uninterrupted.model))


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from robo_orchard_lab.pipeline import PipelineHooks
from robo_orchard_lab.pipeline.hooks import PreemptionConfig
from tiny import make_loader, make_trainer

hooks = PipelineHooks("waits")

@hooks.on_step.after(when="at steps 2")
def wait(args):
    print("waiting", flush=True)
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        time.sleep(0.05)

trainer = make_trainer(
    [PreemptionConfig(save_checkpoint=False), hooks],
    loader=make_loader(7, num_workers=2), max_epoch=2, run_folder=sys.argv[1],
)
trainer()
print("trained", flush=True)
"""


def test_ctrl_c_exit_code(tmp_path: Path) -> None:
    """Ctrl-C reaches all processes; the run exits with 130, without a traceback."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path), str(HELPERS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        workers = psutil.Process(child.pid).children(recursive=True)
        os.killpg(child.pid, signal.SIGINT)
        out, stderr = child.communicate(timeout=30)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130
    assert out == ""  # the rest of the script does not run
    assert "Preemption: SIGINT: stopping at the next commit point; send again to stop at" in stderr
    assert "Traceback" not in stderr
    assert len(workers) == 2
    assert not any(worker.is_running() for worker in workers)
    state = read_run_state(tmp_path)
    assert (state.state, state.progress["global_step_id"]) == ("preempted", 2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_value_of_a_metric_preempts(
    tmp_path: Path, number: int, code: int
) -> None:
    """A monitored metric without a value yet does not turn the preemption into a failure."""
    hooks = PipelineHooks("early")

    @hooks.on_step.after(when="at steps 3")
    def stop(args: PipelineHookArgs) -> None:
        send(number)

    @hooks.on_loop.before
    def monitor(args: PipelineHookArgs) -> None:
        args.metrics.subscribe("rollout/success", print, who="KeepBest")

    trainer = make_trainer(
        [
            hooks,
            LossTrackerConfig(),
            MetricsLoggerConfig(every="1 steps"),
            PreemptionConfig(),
            SaveCheckpointConfig(),
        ],
        max_epoch=1,
        run_folder=tmp_path,
    )
    with pytest.raises(RunPreempted) as stopped:
        trainer()
    assert stopped.value.code == code
    state = read_run_state(tmp_path)
    assert (state.state, state.exit_code, state.error) == ("preempted", code, None)
