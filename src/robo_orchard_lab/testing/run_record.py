"""Record of a run, step by step, and its comparison with another record.

A fact is a value as text; its name says what the value is, as ``optimizer fc.weight.exp_avg``.
`RunRecorder` is the hook that writes events and facts to a file; `record_differences` compares an
uninterrupted run with a run in several processes.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from hashlib import blake2b
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline.checkpoint import (
    capture_random_state,
    named_optimizer_state,
    parameters_beside,
)
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.model import plain_model, plain_name
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES, ChannelName
from robo_orchard_lab.pipeline.trainer import HookBasedTrainer

NAME = "resume proof"
COMPLETED = "completed"
"""Last word of the event that closes an epoch whose data was read to the end."""
_MAX_TEXT = 60
Facts = dict[str, str]
Entry = str | Facts
"""An event as text, or the facts at one moment."""


def value_text(value: Any) -> str:
    """Return a short text; different values have different texts.

    A tensor becomes its dtype, its shape and a digest of its bits; a scalar also its value; any
    other floating-point tensor also its L1 norm, which shows how far apart two tensors are.
    Waits for the device.

    >>> value_text(0.1), value_text(torch.tensor(0.5))
    ('0.1', 'float32 0.5 #0e0932b9568686d5')
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value) if value.dtype != object else value.tolist()
    if isinstance(value, torch.Tensor):
        return _tensor_text(value)
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    if len(text) <= _MAX_TEXT:
        return text
    return f"{text[:_MAX_TEXT]}... #{_digest(text.encode())}"


def _tensor_text(tensor: torch.Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided:
        kind, tensor = f"{kind} {tensor.layout}".replace("torch.", ""), tensor.to_dense()
    data = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    digest = _digest(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    if data.dim() == 0:
        return f"{kind} {data.item()!r} #{digest}"
    norm = ""
    if data.numel() and (data.is_floating_point() or data.is_complex()):
        wide = torch.complex128 if data.is_complex() else torch.float64
        norm = f" of size {data.to(wide).abs().sum().item():.9g}"
    return f"{kind} {tuple(data.shape)}{norm} #{digest}"


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest()


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a nested state with their paths.

    A long list of plain values, and an empty collection, is one leaf.

    >>> list(leaves({"best": [1, 2], "seen": {}}, "hook MyHook"))
    [('hook MyHook.best[0]', 1), ('hook MyHook.best[1]', 2), ('hook MyHook.seen', {})]
    """
    plain = int | float | str
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and (
        0 < len(value) <= 8 or not all(isinstance(item, plain) for item in value)
    ):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def state_facts(trainer: HookBasedTrainer) -> Facts:
    """Describe the complete state of a run as facts, to compare two runs.

    The facts cover weights, accumulated gradients, optimizer, LR scheduler, gradient scaler, RNG
    states, hook states, and metrics that were published but not logged yet.
    """
    run = PipelineRun.standalone(accelerator=trainer.accelerator, model=trainer.model)
    model = plain_model(run)
    parameters = {p: plain_name(name) for name, p in model.named_parameters()}
    found: list[tuple[str, Any]] = [
        (f"weights {plain_name(name)}", value) for name, value in model.state_dict().items()
    ]
    for owner, optimizer in trainer.optimizers.items():
        extra = parameters_beside(optimizer, parameters)
        extra = {p: f"{owner}.{name}" if owner else name for p, name in extra.items()}
        found += [(f"weights {name}", parameter) for parameter, name in extra.items()]
        parameters |= extra
    found += [(f"gradients {n}", p.grad) for p, n in parameters.items() if p.grad is not None]
    for owner, optimizer in trainer.optimizers.items():
        state = named_optimizer_state(optimizer, parameters)
        kind = f"optimizer {owner}".strip()
        for name, values in state["state"].items():
            found += leaves(values, f"{kind} {name}")
        for index, group in enumerate(state["param_groups"]):
            found += leaves(group, f"{kind} group {index}")
    for owner, scheduler in trainer.lr_schedulers.items():
        found += leaves(scheduler.state_dict(), f"lr_scheduler {owner}")
    for owner, scaler in trainer.scalers.items():
        found += leaves(scaler.state_dict(), f"scaler {owner}")
    found += rng_facts().items()
    for name, state in trainer.hooks.state_dict().items():
        found += leaves(state, f"hook {name}")
    for name, window in trainer.metrics.state_dict()["windows"].items():
        found += leaves(window, f"metric {name}")
    return {name.replace(" .", " "): value_text(value) for name, value in found}


def rng_facts() -> Facts:
    """Return digests of the RNG states of torch, CUDA, NumPy and Python."""

    def bits(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.cpu().numpy().tobytes()
        return [*map(bits, value)] if isinstance(value, list | tuple) else value

    state = capture_random_state()
    kinds = {name: state[name] for name in ("torch", "numpy", "python")}
    kinds |= {f"cuda:{index}": value for index, value in enumerate(state["cuda"])}
    return {f"random {name}": _digest(repr(bits(value)).encode()) for name, value in kinds.items()}


def batch_facts(args: PipelineHookArgs) -> Facts:
    """Return the facts of a batch and, if known, the indices of its samples."""
    facts: Facts = {}
    for name in ("sample_numbers", "sample_indices"):
        known = getattr(args, name, None)
        if known is not None:
            facts[name.replace("_", " ")] = value_text(list(known))
    facts.update((name, value_text(value)) for name, value in leaves(args.batch, "batch"))
    return facts


def attribute_facts(hooks: Iterable[PipelineHooks]) -> Facts:
    """Return the facts of plain attributes of hooks, saved or not."""
    return {
        f"{hook.name}.{name}": value_text(value)
        for hook in hooks
        for name, value in vars(hook).items()
        if not name.startswith("_hook_")
        and (value is None or isinstance(value, bool | int | float | str | torch.Tensor))
    }


class RunRecorder(PipelineHooks, AbstractContextManager["RunRecorder"]):
    """Innermost hook of a trainer, writing events and facts to a file.

    The recorder has no state, draws no random numbers, publishes nothing and adds no logging
    point. Reading all weights before each step is slow but changes nothing.

    Args:
        trainer: the trainer whose hooks the recorder joins.
        path: the file to write, line by line: a killed process leaves a readable record.
        stop_after: number of steps of the run after which to request a stop; None for never.
    """

    def __init__(self, trainer: HookBasedTrainer, path: Path, stop_after: int | None) -> None:
        super().__init__(NAME)
        self._trainer = trainer
        self._stop_after = stop_after
        self._start_time = time.monotonic()
        self._file: IO[str] = path.open("w", encoding="utf-8")
        for channel in CHANNEL_NAMES:
            self.register_hook(channel, self._event_writer(channel))
        self.register_hook("on_step", HookContext.from_callable(self._before_step, self._end_step))
        trainer.hooks += self
        self._write("start", trainer.progress.global_step_id)

    def write_end(self) -> None:
        """Write the facts of the run after the trainer returned."""
        self._write("end", state_facts(self._trainer))
        self._write("duration_s", time.monotonic() - self._start_time)

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _write(self, kind: str, value: Any) -> None:
        step = self._trainer.progress.global_step_id
        self._file.write(json.dumps([step, kind, value]) + "\n")
        self._file.flush()  # survives SIGKILL

    def _event_writer(self, channel: ChannelName) -> HookContext[PipelineHookArgs]:
        def write(role: str, args: PipelineHookArgs) -> None:
            counters = args.epoch_id, args.step_id, args.global_step_id, args.optimizer_step_id
            words = [role, channel, *map(str, counters)]
            if args.evaluation is not None:
                words.append(args.evaluation)
            if role == "after" and args.epoch_completed:
                words.append(COMPLETED)
            if args.exception is not None:
                words.append(repr(args.exception))
            self._write("event", " ".join(words))

        return HookContext.from_callable(partial(write, "before"), partial(write, "after"))

    def _before_step(self, args: PipelineHookArgs) -> None:
        self._write("facts", {**batch_facts(args), **state_facts(self._trainer)})
        others = (hook for hook in self._trainer.hooks.named_hooks() if hook is not self)
        self._write("attributes", attribute_facts(others))

    def _end_step(self, args: PipelineHookArgs) -> None:
        if args.exception is not None:
            return
        self._write("facts", {"loss": value_text(args.loss)})
        if self._stop_after is not None and args.global_step_id + 1 >= self._stop_after:
            args.requests.stop("the resume proof stops here", by=NAME)


@dataclass(slots=True)
class RunRecord:
    """Record of the steps of a single process in a run.

    Attributes:
        start: Number of completed steps when the process started.
        steps: Entries in order of time, by the current or next step.
        attributes: Plain attributes of hooks before each step.
        end: Facts after the trainer returned; None if the trainer did not return.
        duration_s: Duration of the trainer's call; 0 if the trainer did not return.
    """

    start: int
    steps: dict[int, list[Entry]] = field(default_factory=dict)
    attributes: dict[int, Facts] = field(default_factory=dict)
    end: Facts | None = None
    duration_s: float = 0.0

    @property
    def last(self) -> int:
        """The current or next step when the process ended."""
        return max(self.steps, default=self.start)


def read_record(path: Path) -> RunRecord | None:
    """Return the record in a file without a truncated last line, or None for no record."""
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    record: RunRecord | None = None
    for line in lines:
        if not line.endswith("\n"):
            break
        step, kind, value = json.loads(line)
        if record is None:
            record = RunRecord(start=step)
        if kind in ("event", "facts"):
            record.steps.setdefault(step, []).append(value)
        elif kind == "attributes":
            record.attributes[step] = value
        elif kind == "end":
            record.steps.setdefault(step, [])
            record.end = value
        elif kind == "duration_s":
            record.duration_s = value
    return record


def compared_values(record: RunRecord) -> int:
    """Return the number of facts and events in a record."""
    entries = [entry for step in record.steps.values() for entry in step]
    return len(record.end or ()) + sum(1 if isinstance(e, str) else len(e) for e in entries)


@dataclass(frozen=True, slots=True)
class ResumeDifference:
    """Difference between a resumed run and the uninterrupted run.

    Attributes:
        step: The ``global_step_id`` of the step in which, or before which, the runs differ.
        name: Name of the fact that differs, such as ``optimizer layer1.weight.exp_avg``.
        straight: Text of the value in the uninterrupted run.
        resumed: Text of the value in the resumed run.
        began_at: Number of completed steps when the process that shows the difference started.
    """

    step: int
    name: str
    straight: str
    resumed: str
    began_at: int

    def __str__(self) -> str:
        return f"step {self.step}: {self.name}"


def record_differences(
    straight: RunRecord, parts: Sequence[RunRecord], ignore: Sequence[str]
) -> Iterator[ResumeDifference]:
    """Yield the differences in order of time; each name once, at its first difference.

    Args:
        straight: record of the uninterrupted run.
        parts: records of the processes of the resumed run, in order of time.
        ignore: patterns of names that may differ.
    """
    joined, began_at = join_records(parts)
    reported: set[str] = set()
    for step in sorted({*straight.steps, *joined.steps}):
        entries, expected = joined.steps.get(step, []), straight.steps.get(step, [])
        # The run was completed and saved, then killed before the last scopes exited.
        if not any(parts[-1].steps.values()):
            missing = expected[len(entries) :]
            if all(_is_event(entry, "after on_epoch", "after on_loop") for entry in missing):
                expected = expected[: len(entries)]
        found = list(_entry_differences(entries, expected))
        if step == straight.last and straight.end is not None and joined.end is not None:
            end = straight.end
            if not any(map(_is_random, joined.end)):  # RNG states are unknown
                end = {name: value for name, value in end.items() if not _is_random(name)}
            found += _fact_differences(joined.end, end)
        for name, value, other in found:
            if name not in reported and not any(fnmatchcase(name, each) for each in ignore):
                reported.add(name)
                yield ResumeDifference(step, name, other, value, began_at.get(step, 0))


def join_records(parts: Sequence[RunRecord]) -> tuple[RunRecord, dict[int, int]]:
    """Join the records of all processes of one run, each of which resumed the one before.

    Return also, for each step, the step at which the process of this step started.

    Left out are the loop and epoch events that a stop causes (an early exit, a second entry), and
    the work that a process did after the checkpoint from which the next process resumed.
    """
    joined = RunRecord(start=0)
    began_at: dict[int, int] = {}
    for part in parts:
        if not part.steps and part.end is None:  # killed before the first event
            continue
        steps = {step: [*entries] for step, entries in part.steps.items()}
        if joined.steps:
            before, after = joined.steps.get(part.start, []), steps.get(part.start, [])
            joined.steps = {s: e for s, e in joined.steps.items() if s < part.start}
            steps[part.start] = _join_at_stop(before, after)
        # A completed run is resumed without a step, so its RNG states are not restored.
        is_idle = not any(_is_event(e, "before on_step") for s in part.steps.values() for e in s)
        if is_idle and part.end is not None:
            previous = joined.end or {}  # unknown if the process was killed at the very end
            kept = {name: value for name, value in previous.items() if _is_random(name)}
            rest = {name: value for name, value in part.end.items() if not _is_random(name)}
            joined.end = {**rest, **kept}
        else:
            joined.end = part.end
        joined.steps.update(steps)
        began_at.update((step, part.start) for step in steps)
    return joined, began_at


def _join_at_stop(before: list[Entry], after: list[Entry]) -> list[Entry]:
    """Join the entries of two processes at the step at which the first process was saved."""
    if not after:  # the run was completed and saved, before another rank was killed
        return [entry for entry in before if not _has_failed(entry)]
    after = after[1:]  # before on_loop
    ends = ["before on_step", "after on_loop"]
    if after and _is_event(after[0], "before on_epoch") and int(str(after[0]).split()[3]) > 0:
        after = after[1:]
        # A stop closes the epoch before the due evaluations; the next process reopens the epoch.
        before = [
            e for e in before if not _is_event(e, "after on_epoch") or str(e).endswith(COMPLETED)
        ]
        ends.append("after on_epoch")
    else:
        ends.append("before on_epoch")
    cuts = (index for index, entry in enumerate(before) if _is_event(entry, *ends))
    return before[: next(cuts, len(before))] + after


def _is_random(name: str) -> bool:
    return name.startswith("random ")


def _is_event(entry: Entry, *events: str) -> bool:
    return isinstance(entry, str) and entry.startswith(tuple(f"{event} " for event in events))


def _has_failed(entry: Entry) -> bool:
    """Return True for the end of an epoch or of the loop by an exception, the seventh word."""
    if not _is_event(entry, "after on_epoch", "after on_loop"):
        return False
    return str(entry).split()[6:7] not in ([], [COMPLETED])


def _entry_differences(
    found: Sequence[Entry], expected: Sequence[Entry]
) -> Iterator[tuple[str, str, str]]:
    """Yield name and both values of each difference in a step, up to a different event."""
    for pair in zip_longest(found, expected, fillvalue="no further event in this step"):
        entry, other = pair
        if isinstance(entry, dict) and isinstance(other, dict):
            yield from _fact_differences(entry, other)
        elif entry != other:
            texts = [each if isinstance(each, str) else "the facts of a step" for each in pair]
            yield "events", texts[0], texts[1]
            return


def _fact_differences(found: Facts, expected: Facts) -> Iterator[tuple[str, str, str]]:
    for name in {**expected, **found}:
        value, other = found.get(name, "missing"), expected.get(name, "missing")
        if value != other:
            yield name, value, other


def attribute_hints(straight: RunRecord, parts: Sequence[RunRecord]) -> list[str]:
    """Describe hook attributes with a different value at the start of a resumed process.

    An attribute that differs is not necessarily a fault: some are times or process ids.
    """
    hints: dict[str, str] = {}
    for part in parts[1:]:
        step = part.start
        found, expected = part.attributes.get(step), straight.attributes.get(step)
        if found is None or expected is None:
            continue
        for name, value, other in _fact_differences(found, expected):
            hints.setdefault(name, f"{name} is {value} before step {step}, was {other}")
    return [*hints.values()]
