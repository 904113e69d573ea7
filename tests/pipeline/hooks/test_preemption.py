"""A signal saves the run and stops it, wherever it is."""

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
from robo_orchard_lab.pipeline.data.fetching import IgnoreSignals, ignore_signals_in_workers
from robo_orchard_lab.pipeline.errors import (
    PipelineConfigError,
    PipelineStateError,
    RunPreempted,
)
from robo_orchard_lab.pipeline.hooks import (
    PreemptionConfig,
    SaveCheckpointConfig,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.metrics import MetricValue
from robo_orchard_lab.pipeline.run.run_state import read_run_state
from robo_orchard_lab.testing import assert_no_device_sync, assert_weights_unchanged
from tiny import equal, make_model, make_trainer, weights


def send(number: int = signal.SIGTERM) -> None:
    """A signal to this process, as another one would send it; to be handled by the main thread."""
    os.kill(os.getpid(), number)


def send_to_all(number: int = signal.SIGTERM) -> None:
    """As to a process group: to the workers, which are the children, and this process.

    Python's tracker of shared memory is left out: it is of the whole test session, and where it
    dies, the next one who shares memory warns.
    """
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if not any("resource_tracker" in part for part in child.cmdline()):
                child.send_signal(number)
    send(number)


class Saver(PipelineHooks):
    """Saves when asked to, by writing down the step and why."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[tuple[int, str]] = []
        self.on_loop.before(self._open)

    def _open(self, args: PipelineHookArgs) -> None:
        args.run.savers[self.name] = lambda asked: self.save(args, asked)

    def save(self, args: PipelineHookArgs, asked: Any) -> None:
        assert not args.progress.in_step
        self.saved.append((args.global_step_id, str(asked)))

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.saved]


def planted(channel: str, role: str, do: Callable[[PipelineHookArgs], Any]) -> PipelineHooks:
    hooks = PipelineHooks(f"planted on {channel}")
    getattr(getattr(hooks, channel), role)(do)
    return hooks


def sends_at(step: int, channel: str = "on_step", role: str = "after") -> PipelineHooks:
    """A hook in which the process gets SIGTERM in one step, counted from 1."""

    def maybe(args: PipelineHookArgs) -> None:
        if args.progress.steps_done == step:
            send()

    return planted(channel, role, maybe)


def preempted(hooks: Any, *, code: int = 143, **options: Any) -> Saver:
    """Run to the end that a signal makes, and give what was saved."""
    saver = Saver()
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    options = {"max_epoch": 3, **options}
    with pytest.raises(RunPreempted) as stopped:
        make_trainer([PreemptionConfig(), saver, *hooks], **options)()
    assert stopped.value.code == code
    before.pop(signal.SIGCHLD)  # torch's, for its workers
    assert {number: signal.getsignal(number) for number in before} == before
    return saver


def test_a_signal_in_a_step_saves_after_it(tmp_path: Path) -> None:
    """The step is finished, saved, and the last; the file of the run says who asked and why."""
    saver = preempted([sends_at(3)], run_folder=tmp_path)
    assert saver.steps == [3]
    assert "received SIGTERM" in saver.saved[0][1]
    state = read_run_state(tmp_path)
    assert (state.state, state.exit_code) == ("preempted", 143)
    assert (state.by, state.reason) == ("Preemption", "received SIGTERM")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_the_exit_code_is_that_of_the_signal(name: str, code: int) -> None:
    """128 and the signal's number, as a shell tells it."""
    number = signal.Signals[name]

    def maybe(args: PipelineHookArgs) -> None:
        if args.global_step_id == 1:
            send(number)

    assert preempted([planted("on_batch", "before", maybe)], code=code).steps == [2]


def test_an_exit_code_of_ones_own() -> None:
    """Schedulers that start a job again by its code get that one."""
    with pytest.raises(RunPreempted) as stopped:
        make_trainer([PreemptionConfig(exit_code=75), Saver(), sends_at(3)], max_step=9)()
    assert stopped.value.code == 75


def test_an_ignored_interrupt_stays_ignored() -> None:
    """A job in the background of a shell is not stopped by a Ctrl-C at its terminal."""
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
    """A run whose hooks save by themselves, or not at all, just stops."""
    trainer = make_trainer([PreemptionConfig(save_checkpoint=False), sends_at(3)], max_step=9)
    with pytest.raises(RunPreempted):
        trainer()
    assert trainer.progress.global_step_id == 3


@pytest.mark.parametrize(
    ("channel", "role", "steps"),
    [
        ("on_loop", "before", [1]),  # one that is registered after Preemption
        ("on_epoch", "before", [1]),
        ("on_epoch", "after", [8]),  # 7 batches make an epoch
        ("on_model_forward", "before", [1]),
        ("on_optimizer_step", "after", [1]),
    ],
)
def test_a_signal_around_steps(channel: str, role: str, steps: list[int]) -> None:
    """It is granted at the next commit point that follows a step."""
    sent: list[int] = []

    def once(args: PipelineHookArgs) -> None:
        if not sent:
            sent.append(1)
            send()

    assert preempted([planted(channel, role, once)]).steps == steps


def test_a_signal_in_the_last_step_of_an_epoch() -> None:
    """The epoch is over, and counted, when it is saved."""
    epochs: list[int] = []
    saver = Saver()
    saver.save = lambda args, asked: epochs.append(args.epoch_id)  # type: ignore[method-assign]
    with pytest.raises(RunPreempted):
        make_trainer([PreemptionConfig(), saver, sends_at(7)], max_epoch=3)()
    assert epochs == [1]


def test_a_signal_after_the_last_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run is completed, and not started again; the log has the signal."""
    hook = planted("on_loop", "after", lambda args: send())
    make_trainer([PreemptionConfig(), Saver(), hook], max_step=3, run_folder=tmp_path)()
    assert read_run_state(tmp_path).state == "completed"
    assert "received SIGTERM when the last step was over" in caplog.text


def test_a_signal_during_a_save() -> None:
    """The save that is on its way is whole, and one more step is done."""
    saver = Saver()
    plain = saver.save
    sent: list[int] = []

    def save(args: PipelineHookArgs, asked: Any) -> None:
        if not sent:
            sent.append(1)
            send()
            time.sleep(0.05)
        plain(args, asked)

    saver.save = save  # type: ignore[method-assign]
    asks = PipelineHooks("asks")
    asks.on_step.after(when="at steps 3")(lambda args: args.requests.save("it is time"))
    with pytest.raises(RunPreempted):
        make_trainer([PreemptionConfig(), saver, asks], max_step=9)()
    assert saver.steps == [3, 4]


def test_a_run_that_is_over_is_saved_though_a_signal_came(tmp_path: Path) -> None:
    """In its last step, the signal changes nothing, whether or not it would save by itself."""
    preemption, save = PreemptionConfig(save_checkpoint=False), SaveCheckpointConfig(every=None)
    make_trainer([preemption, save, sends_at(3)], max_step=3, run_folder=tmp_path)()
    state = read_run_state(tmp_path)
    assert (state.state, state.reason, state.by) == ("completed", None, None)
    assert state.checkpoint is not None
    assert state.checkpoint.step == 3


class Samples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples of which one is there only when the signal has been sent."""

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
    """The same, without an index."""

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
    besides: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Meanwhile, when the sample is waited for, send a signal to all; then let it come."""

    def send_it() -> None:
        wait_until(lambda: signalled.with_suffix(".awaited").exists() and besides())
        time.sleep(0.05)  # for the main thread to wait, too
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
def test_a_signal_in_the_wait_for_data(
    kind: Callable[[Path], Dataset[Any]],
    workers: int,
    number: signal.Signals,
    context: str | None,
    tmp_path: Path,
) -> None:
    """Workers outlive a signal to all processes; the batch comes, and is the last one."""
    signalled = tmp_path / "signalled"
    loader = DataLoader(
        kind(signalled), batch_size=4, num_workers=workers, multiprocessing_context=context
    )
    saver, done = Saver(), threading.Event()

    def tell(args: PipelineHookArgs) -> None:
        if args.global_step_id == 2:  # all steps before the batch that is waited for
            done.set()

    hooks: list[Any] = [planted("on_step", "after", tell), PreemptionConfig(), saver]
    with (
        signal_when_awaited(signalled, number, besides=done.is_set),
        pytest.raises(RunPreempted) as stopped,
    ):
        make_trainer(hooks, loader=loader, max_epoch=3)()
    assert stopped.value.code == 128 + number
    assert saver.steps == [4]
    assert loader.worker_init_fn is None  # as it was


def test_a_worker_takes_its_own_end() -> None:
    """A second SIGTERM ends a worker, which is how torch ends one that hangs."""
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
    time.sleep(5)  # until the worker's end interrupts it


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
def test_a_script_ends_with_its_persistent_workers(last: str, code: int) -> None:
    """Also where its loader and trainer are there to the last, where it fails or trains again."""
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT_WITH_WORKERS + last],
        cwd=HELPERS,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == code, ended.stderr
    assert "killed by signal" not in ended.stderr


def test_a_workers_own_start_is_kept() -> None:
    """What the user's worker_init_fn sets is what holds."""
    ready = torch.zeros(1).share_memory_()

    def start(worker_id: int) -> None:
        ready.add_(1)

    loader = DataLoader(Samples(), batch_size=4, num_workers=1, worker_init_fn=start)
    preempted([sends_at(2)], loader=loader)
    assert ready.item() == 1
    assert loader.worker_init_fn is start


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_during_an_evaluation(workers: int, tmp_path: Path) -> None:
    """The evaluation ends with its value, and one more step is done."""
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


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    """Half a second after the first, one more leaves the step that is open, and saves nothing."""

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
            finally:  # a third one does what it always does
                assert signal.getsignal(signal.SIGTERM) is before

    begun_at = time.monotonic()
    assert preempted([planted("on_step", "after", wait)], code=130, run_folder=tmp_path).steps == []
    assert time.monotonic() - begun_at < 30
    state = read_run_state(tmp_path)
    assert (state.state, state.exit_code) == ("preempted", 130)
    assert state.reason == "received SIGTERM, and a signal to stop at once"
    assert state.by == "Preemption"


def test_handlers_are_put_back_after_an_error() -> None:
    """What was there before the loop is there after it, also where a hook has failed."""
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


def test_signals_of_no_concern_stay_as_they_are() -> None:
    """Only those that are named are taken."""
    kept = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []
    watch = planted("on_step", "before", lambda args: seen.append(signal.getsignal(signal.SIGINT)))
    make_trainer([PreemptionConfig(signals=("SIGTERM",)), Saver(), watch], max_step=1)()
    assert seen == [kept]


def test_a_fork_is_left_alone() -> None:
    """A process that is forked meanwhile ends by the signal, as it would without the hook."""
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


def test_another_thread_is_refused() -> None:
    """Python handles signals in the main thread alone."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            make_trainer([PreemptionConfig(), Saver()], max_step=1)()
        except PipelineStateError as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="aside")
    thread.start()
    thread.join()
    assert "Preemption: signals are handled in the main thread alone" in str(errors)
    assert "called in 'aside'" in str(errors)


def test_a_hook_that_saves_is_asked_for_ahead() -> None:
    """That nobody saves is told before the first step, not when the signal comes."""
    with pytest.raises(PipelineConfigError, match="register a SaveCheckpoint, or set save_check"):
        make_trainer(PreemptionConfig(), max_step=1)()


@pytest.mark.parametrize(
    ("signals", "told"),
    [
        (("SIGTEM",), "no signal 'SIGTEM'"),
        (("SIGKILL",), "SIGKILL can't be handled"),
        ((), "at least 1"),
    ],
)
def test_signals_are_checked_ahead(signals: tuple[str, ...], told: str) -> None:
    """A name that is none, or one that can't be taken, is refused when configured."""
    with pytest.raises(ValueError, match=told):
        PreemptionConfig(signals=signals)


def test_it_watches_without_a_trace() -> None:
    """It changes no weights and reads nothing from the device."""
    hook = PreemptionConfig(save_checkpoint=False)
    assert_weights_unchanged(hook)
    assert_no_device_sync(hook)


class Remembers(PipelineHooks):
    """Sends a signal while its state is saved, at the first save."""

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
def test_a_preempted_run_goes_on_as_if_nothing_had_been(
    place: str, workers: int, tmp_path: Path
) -> None:
    """Resumed, it is bit for bit the run without a signal: within a window, within an epoch."""

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

    straight = train("straight", sends=False)
    straight()
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
    assert equal(weights(resumed.model), weights(straight.model))


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


def test_a_process_ends_with_the_code_of_ctrl_c(tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches all processes; the run stops, without a traceback, by 130."""
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
        out, told = child.communicate(timeout=30)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 130
    assert out == ""  # what follows in the script is not done
    assert "Preemption: SIGINT: stopping at the next commit point; once more to stop at" in told
    assert "Traceback" not in told
    assert len(workers) == 2
    assert not any(worker.is_running() for worker in workers)
    state = read_run_state(tmp_path)
    assert (state.state, state.progress["global_step_id"]) == ("preempted", 2)
