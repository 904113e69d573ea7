"""What a process has done of a run, step by step, in a file."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from hashlib import blake2b
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
from robo_orchard_lab.pipeline.context import PipelineHookArgs, PipelineRun
from robo_orchard_lab.pipeline.hook_set import PipelineHooks
from robo_orchard_lab.pipeline.model import plain_model, plain_name
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES, ChannelName
from robo_orchard_lab.pipeline.trainer import HookBasedTrainer

# --- run facts -------------------------------------------------------------------------------
# What a run is made of at one moment, by name, each in a few characters.


_LONGEST = 60


def value_text(value: Any) -> str:
    """A value in a few characters that are others for every other value.

    A tensor is its type, its shape and a digest of its bits; of one element, also the element; of
    several, also the sum of their sizes, to see how far apart two are. Waits for the device.

    >>> value_text(0.1), value_text(torch.tensor(0.5))
    ('0.1', 'float32 0.5 #0e0932b9568686d5')
    """
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value) if value.dtype != object else value.tolist()
    if isinstance(value, torch.Tensor):
        return _tensor_text(value)
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}... #{_digest(text.encode())}"


def _tensor_text(tensor: torch.Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided:
        kind, tensor = f"{kind} {tensor.layout}".replace("torch.", ""), tensor.to_dense()
    held = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    digest = _digest(held.reshape(-1).view(torch.uint8).numpy().tobytes())
    if held.numel() == 1 and held.dim() == 0:
        return f"{kind} {held.item()!r} #{digest}"
    size = ""
    if held.numel() and (held.is_floating_point() or held.is_complex()):
        wide = torch.complex128 if held.is_complex() else torch.float64
        size = f" of size {held.to(wide).abs().sum().item():.9g}"
    return f"{kind} {tuple(held.shape)}{size} #{digest}"


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=8).hexdigest()


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested state with their places.

    >>> list(leaves({"best": [1, 2], "seen": {}}, "hook MyHook"))
    [('hook MyHook.best[0]', 1), ('hook MyHook.best[1]', 2), ('hook MyHook.seen', {})]
    """
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple) and value and not _plain(value):
        for index, item in enumerate(value):
            yield from leaves(item, f"{place}[{index}]")
    else:
        yield place, value


def _plain(items: list[Any] | tuple[Any, ...]) -> bool:
    """Whether a list is one of many numbers, which is better told as a whole."""
    return len(items) > 8 and all(isinstance(item, int | float | str) for item in items)


def state_facts(trainer: HookBasedTrainer) -> dict[str, str]:
    """Weights, open gradients, optimizer, schedule, random state, hooks and unlogged metrics."""
    model = plain_model(PipelineRun(accelerator=trainer.accelerator, model=trainer.model))
    parameters = {p: plain_name(name) for name, p in model.named_parameters()}
    found: list[tuple[str, Any]] = [
        (f"weights {plain_name(name)}", value) for name, value in model.state_dict().items()
    ]
    if trainer.optimizer is not None:
        beside = parameters_beside(trainer.optimizer, parameters)
        found += [(f"weights {name}", parameter) for parameter, name in beside.items()]
        parameters |= beside
    found += [(f"gradients {n}", p.grad) for p, n in parameters.items() if p.grad is not None]
    if trainer.optimizer is not None:
        state = named_optimizer_state(trainer.optimizer, parameters)
        for name, values in state["state"].items():
            found += leaves(values, f"optimizer {name}")
        for index, group in enumerate(state["param_groups"]):
            found += leaves(group, f"optimizer group {index}")
    if trainer.lr_scheduler is not None:
        found += leaves(trainer.lr_scheduler.state_dict(), "schedule ")
    if trainer.accelerator.scaler is not None:
        found += leaves(trainer.accelerator.scaler.state_dict(), "scaler ")
    found += random_facts()
    for name, state in trainer.hooks.state_dict().items():
        found += leaves(state, f"hook {name}")
    for name, window in trainer.metrics.state_dict()["windows"].items():
        found += leaves(window, f"metric {name}")
    return {name.replace(" .", " "): value_text(value) for name, value in found}


def random_facts() -> list[tuple[str, Any]]:
    """Where torch, CUDA, NumPy and Python are in their streams."""
    state = capture_random_state()
    cuda = [(f"random cuda:{index}", value) for index, value in enumerate(state["cuda"])]
    kinds = [(f"random {name}", state[name]) for name in ("torch", "numpy", "python")]
    return [(name, _digest(repr(_bits(value)).encode())) for name, value in kinds + cuda]


def _bits(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu().numpy().tobytes()
    return [_bits(item) for item in value] if isinstance(value, list | tuple) else value


def batch_facts(args: PipelineHookArgs) -> dict[str, str]:
    """Which samples the batch is of, where the trainer knows, and what is in it."""
    facts: dict[str, str] = {}
    for name in ("sample_numbers", "sample_indices"):
        known = getattr(args, name, None)
        if known is not None:
            facts[name.replace("_", " ")] = value_text(list(known))
    facts.update((name, value_text(value)) for name, value in leaves(args.batch, "batch"))
    return facts


def attribute_facts(hooks: Iterable[PipelineHooks]) -> dict[str, str]:
    """The plain attributes of hooks, in their states or not."""
    return {
        f"{hook.name}.{name}": value_text(value)
        for hook in hooks
        for name, value in vars(hook).items()
        if not name.startswith("_hook_")
        and (value is None or isinstance(value, bool | int | float | str | torch.Tensor))
    }


NAME = "resume proof"
COMPLETED = "completed"
"""How the event ends in which an epoch is left whose data was passed over to its end."""
Facts = dict[str, str]
Entry = str | Facts
"""An event, as text, or what was found at a moment, by name."""


class RunRecorder(PipelineHooks, AbstractContextManager["RunRecorder"]):
    """Writes down what a trainer does, and has no state of its own.

    It is the innermost hook, draws nothing, publishes nothing and makes no logging point; it reads
    from the device ahead of every step, which takes time and changes nothing.

    Args:
        trainer: whose hooks it joins.
        path: of the file to write; it is written line by line, so that one that is killed leaves
            what it has done.
        stop_after: ask to stop when so many steps of the run are done; None for the run's own end.
    """

    def __init__(self, trainer: HookBasedTrainer, path: Path, stop_after: int | None) -> None:
        super().__init__(NAME)
        self._trainer = trainer
        self._stop_after = stop_after
        self._began_at = time.monotonic()
        self._file: IO[str] = path.open("w", encoding="utf-8")
        for channel in CHANNEL_NAMES:
            self.register_hook(channel, self._recording(channel))
        self.register_hook("on_step", HookContext.from_callable(self._look, self._end_step))
        trainer.hooks += self
        self.write("start", trainer.progress.global_step_id)

    def write(self, kind: str, value: Any) -> None:
        """Add a line, which is there to read at once, whatever happens to this process."""
        step = self._trainer.progress.global_step_id
        self._file.write(json.dumps([step, kind, value]) + "\n")
        self._file.flush()

    def write_end(self) -> None:
        """Write down what the run is when the trainer has returned."""
        self.write("end", state_facts(self._trainer))
        self.write("took_s", time.monotonic() - self._began_at)

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def _recording(self, channel: ChannelName) -> HookContext[PipelineHookArgs]:
        def before(args: PipelineHookArgs) -> None:
            self._write_event("before", channel, args)

        def after(args: PipelineHookArgs) -> None:
            self._write_event("after", channel, args)

        return HookContext.from_callable(before, after)

    def _write_event(self, role: str, channel: ChannelName, args: PipelineHookArgs) -> None:
        counters = args.epoch_id, args.step_id, args.global_step_id, args.optimizer_step_id
        words = [role, channel, *map(str, counters)]
        if args.evaluation is not None:
            words.append(args.evaluation)
        if role == "after" and args.epoch_completed:
            words.append(COMPLETED)
        if args.exception is not None:
            words.append(repr(args.exception))
        self.write("event", " ".join(words))

    def _look(self, args: PipelineHookArgs) -> None:
        self.write("facts", {**batch_facts(args), **state_facts(self._trainer)})
        others = (hook for hook in self._trainer.hooks.named_hooks() if hook is not self)
        self.write("attributes", attribute_facts(others))

    def _end_step(self, args: PipelineHookArgs) -> None:
        if args.exception is not None:
            return
        self.write("facts", {"loss": value_text(args.loss)})
        if self._stop_after is not None and args.global_step_id + 1 >= self._stop_after:
            args.requests.stop("the proof of resuming stops here", by=NAME)


@dataclass(slots=True)
class RunRecord:
    """What one process has done of a run."""

    start: int
    """How many steps of the run were done when it began."""
    steps: dict[int, list[Entry]] = field(default_factory=dict)
    """What happened, in the order of time, by the step that was open or to come next."""
    attributes: dict[int, Facts] = field(default_factory=dict)
    """The plain attributes of hooks ahead of each step."""
    end: Facts | None = None
    """What the run was when the trainer had returned; None where it has not."""
    took_s: float = 0.0
    """How long the trainer ran, if it has returned."""

    @property
    def last(self) -> int:
        """The step that was open, or to come next, when it ended."""
        return max(self.steps, default=self.start)


def read_record(path: Path) -> RunRecord | None:
    """The record in a file, without a last line that was cut short; None where there is none."""
    lines = [*_lines(path)] if path.exists() else []
    if not lines:
        return None
    record = RunRecord(start=lines[0][0])
    for step, kind, value in lines:
        if kind in ("event", "facts"):
            record.steps.setdefault(step, []).append(value)
        elif kind == "attributes":
            record.attributes[step] = value
        elif kind == "end":
            record.steps.setdefault(step, [])
            record.end = value
        elif kind == "took_s":
            record.took_s = value
    return record


def _lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                step, kind, value = json.loads(line)
                yield step, kind, value
