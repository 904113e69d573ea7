"""Plan of a run: its hooks by channel, as data, text, nested boxes and a Mermaid diagram.

:func:`write_plan` writes plan.json: the plan of the last start, and its changes at resumes.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robo_orchard_core.utils.hook import FunctionInfo, short_location
from robo_orchard_core.utils.logging import one_line
from robo_orchard_core.utils.strict_json import JsonError, parse_json
from robo_orchard_lab.pipeline.errors import StateError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, hook_name
from robo_orchard_lab.pipeline.job_log import announce, job_logger
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES, PIPELINE_CHANNELS, PipelineChannel
from robo_orchard_lab.pipeline.run.durable import make_folder, remove_leftovers, replace_file
from robo_orchard_lab.pipeline.run.event_log import EventLog
from robo_orchard_lab.pipeline.run.run_state import read_bounded

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

EFFECTS = ("reads", "changes", "requests")
"""Attributes of hook classes that declare effects, see :attr:`PipelineHooks.reads`."""
NAMED_UPDATES = "NamedOptimizersHook"
"""Class of the hook that updates several optimizers."""
TEXT_WIDTH = 80
_LEAST_BOX_WIDTH = 60  # five nested boxes need 20 columns for their sides
_SPECIAL = re.compile(r"[^\w .,:/|=()-]|[^\x00-\x7f]|^-|\.(?= )")  # "- a" and "1. a" are lists


@dataclass(frozen=True)
class PlannedHook:
    """Hook on a channel of a run.

    Attributes:
        position: Position from 0, the outermost: its ``before`` runs first, its ``after`` last.
        hook: Name in the experiment of the hooks to which it belongs.
        when: ``always``, or the trigger.
        before: File and line of ``before``, or None; likewise ``after``.
        reads: Declared names, for all channels of the hook; None if not declared. Likewise
            ``changes`` and ``requests``.
        defined_in: Place in an experiment's file, if known.
    """

    channel: str
    position: int
    hook: str
    class_name: str
    when: str
    before: str | None
    after: str | None
    reads: tuple[str, ...] | None = None
    changes: tuple[str, ...] | None = None
    requests: tuple[str, ...] | None = None
    defined_in: str = ""

    @property
    def title(self) -> str:
        """Name and class, on one line."""
        name, kind = one_line(self.hook), one_line(self.class_name)
        return name if name == kind else f"{name} ({kind})"

    @property
    def calls(self) -> str:
        """``before``, ``after`` or both."""
        return ", ".join(role for role in ("before", "after") if getattr(self, role) is not None)

    @property
    def source(self) -> str:
        """Short files and lines; the common file of ``before`` and ``after`` once."""
        known = dict.fromkeys(place for place in (self.before, self.after) if place is not None)
        places = [*map(short_location, known)]
        files = [place.rpartition(":")[0] for place in places]
        if len(places) == 2 and files[0] and files[0] == files[1]:
            places[1] = places[1].rpartition(":")[2]
        return one_line(", ".join(places))

    @property
    def link(self) -> str | None:
        """``file://`` link to the source, or None without a file."""
        file = Path((self.before or self.after or "").rpartition(":")[0])
        return file.absolute().as_uri() if file.suffix else None

    @property
    def effects(self) -> list[str]:
        """Lines such as ``reads loss, batch``; effects without names have none."""
        declared = {name: getattr(self, name) for name in EFFECTS}
        unknown = [name for name, found in declared.items() if found is None]
        lines = [f"{name} {', '.join(found)}" for name, found in declared.items() if found]
        if unknown:
            lines.append(f"{', '.join(unknown)}: not declared")
        return [*map(one_line, lines)] or ["reads, changes and requests nothing"]

    @property
    def trigger(self) -> str:
        """``, when ...`` for a trigger, else empty."""
        return "" if self.when == "always" else f", when {one_line(self.when)}"


@dataclass(frozen=True, repr=False)
class RunPlan:
    """Hooks of a run in the order of execution, the outermost of each channel first.

    ``str`` is a tree as plain text, and rich prints nested boxes:

    >>> notes = PipelineHooks("notes")
    >>> notes.declare_effects(reads=["loss"])
    >>> @notes.on_epoch.after(when="2 epochs")
    ... def note(args):
    ...     print(args.epoch_id)
    >>> print(RunPlan.of(notes))  # doctest: +ELLIPSIS
    on_loop: one call of the trainer
      on_epoch: one pass over the data
        - notes (PipelineHooks), when 2 epochs
            after ...
            reads loss
    ...
    """

    hooks: tuple[PlannedHook, ...]

    @classmethod
    def of(cls, hooks: PipelineHooks) -> RunPlan:
        """List the hooks of a run; never fails."""
        return cls(
            tuple(
                PlannedHook(
                    channel=channel,
                    position=entry.position,
                    hook=hook_name(entry),
                    class_name=type(entry.owner or entry.context).__name__,
                    when=str(getattr(entry.context, "when", "always")),
                    before=_location(entry.before),
                    after=_location(entry.after),
                    reads=_declared(entry.owner, "reads"),
                    changes=_declared(entry.owner, "changes"),
                    requests=_declared(entry.owner, "requests"),
                )
                for channel in CHANNEL_NAMES
                for entry in hooks.get_channel(channel).entries()
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, as in plan.json."""
        return {"version": 2, "hooks": [asdict(hook) for hook in self.hooks]}

    def __repr__(self) -> str:
        return self.to_text()  # for notebooks and the interactive interpreter

    def to_text(self, width: int = TEXT_WIDTH) -> str:
        """Return the plan as an indented tree with lines of at most ``width`` columns."""
        lines: list[str] = []

        def add(text: str, indent: int, hanging: int = 0) -> None:
            first, rest = " " * indent, " " * (indent + hanging)
            lines.extend(
                textwrap.wrap(
                    text,
                    max(width, indent + hanging + 20),
                    initial_indent=first,
                    subsequent_indent=rest,
                    break_on_hyphens=False,
                )
            )

        def add_channel(channel: PipelineChannel, depth: int) -> None:
            add(f"{channel.name}: {self._around(channel)}", 2 * depth)
            for hook, is_first in self._of_channel(channel.name):
                head, *details = _lines(hook, is_first, width - 2 * depth - 4)
                add(f"- {head}", 2 * depth + 2, 2)
                for line in details:
                    add(line, 2 * depth + 6, 2)
            for child in _children(channel):
                add_channel(child, depth + 1)

        for channel in _children(None):
            add_channel(channel, 0)
        return "\n".join(lines)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        from rich.console import Group
        from rich.padding import Padding
        from rich.panel import Panel
        from rich.style import Style
        from rich.text import Text

        if options.max_width < _LEAST_BOX_WIDTH:
            yield Text(self.to_text(options.max_width))
            return

        def box(channel: PipelineChannel, width: int) -> RenderableType:
            title = Text.assemble((channel.name, "bold"), "  ", (self._around(channel), "dim"))
            parts: list[RenderableType] = []
            for hook, is_first in self._of_channel(channel.name):
                head, *details = _lines(hook, is_first, width)
                line = Text(head, overflow="fold")
                line.stylize("bold cyan", 0, len(hook.title if is_first else one_line(hook.hook)))
                if hook.trigger:
                    line.highlight_words([hook.trigger.removeprefix(", ")], "yellow")
                parts.append(line)
                # Terminals open the source on a click.
                link = Style(link=hook.link)
                for text in details:
                    style = link if text.startswith(hook.calls) else ""
                    parts.append(Padding(Text(text, style, overflow="fold"), (0, 0, 0, 2)))
            parts += [box(child, width - 4) for child in _children(channel)]
            if not parts:
                return Text.assemble(title, ("  no hooks", "dim"))
            return Panel(Group(*parts), title=title, title_align="left", border_style="dim")

        for channel in _children(None):
            yield box(channel, options.max_width - 4)

    def to_mermaid(self) -> str:
        """Return a Mermaid flowchart: channels as nested subgraphs, arrows in order of entry."""
        lines = ["flowchart TB"]
        arrows: list[str] = []
        numbers = {(hook.channel, hook.position): index for index, hook in enumerate(self.hooks)}

        def add_channel(channel: PipelineChannel, depth: int) -> None:
            indent = "  " * depth
            label = _quoted(f"{channel.name}: {self._around(channel)}")
            lines.append(f"{indent}subgraph {channel.name}[{label}]")
            lines.append(f"{indent}  direction TB")
            names: list[str] = []
            for hook, is_first in self._of_channel(channel.name):
                names.append(f"h{numbers[hook.channel, hook.position]}")
                label = _quoted(*_lines(hook, is_first, 0))
                lines.append(f"{indent}  {names[-1]}[{label}]")
            if not names:  # a subgraph without a node is no box
                lines.append(f"{indent}  {channel.name}_none[{_quoted('no hooks')}]")
            arrows.extend(f"  {a} --> {b}" for a, b in pairwise(names))
            for child in _children(channel):
                add_channel(child, depth + 1)
            lines.append(f"{indent}end")

        for channel in _children(None):
            add_channel(channel, 1)
        arrows += ["  on_model_forward --> on_model_backward", "  on_batch --> on_optimizer_step"]
        return "\n".join([*lines, *arrows])

    def _of_channel(self, channel: str) -> Iterator[tuple[PlannedHook, bool]]:
        """Iterate over the hooks of a channel, with True where a hook appears first in the tree."""
        first: dict[Any, PlannedHook] = {}
        for hook in self.hooks:  # in the order of the tree, see CHANNEL_NAMES
            first.setdefault((hook.hook, *hook.effects), hook)
        return (
            (hook, first[hook.hook, *hook.effects] is hook)
            for hook in self.hooks
            if hook.channel == channel
        )

    def _around(self, channel: PipelineChannel) -> str:
        """Return the body of a channel, as this run opens the channel."""
        is_update = channel.name == "on_optimizer_step"
        if is_update and any(hook.class_name == NAMED_UPDATES for hook in self.hooks):
            return f"{channel.around}, in on_batch for a yielded loss"
        return channel.around


def _location(function: Any) -> str | None:
    if function is None:
        return None
    info = FunctionInfo.of(function)
    return info.location or info.name


def _declared(owner: Any, name: str) -> tuple[str, ...] | None:
    """Return the declared names of a hook, or None.

    Subclasses may use the attribute for other purposes: of an instance, only a tuple counts.
    """
    value = getattr(owner, "__dict__", {}).get(name)
    if not isinstance(value, tuple):
        value = inspect.getattr_static(type(owner), name, None)
    is_declaration = isinstance(value, tuple | list) and all(isinstance(v, str) for v in value)
    return tuple(value) if is_declaration else None


def _children(parent: PipelineChannel | None) -> list[PipelineChannel]:
    name = None if parent is None else parent.name
    return [channel for channel in PIPELINE_CHANNELS if channel.parent == name]


def _lines(hook: PlannedHook, is_first: bool, width: int) -> list[str]:
    """Return the lines of a hook: head, source, and effects where the hook appears first.

    Later mentions are one line if the line has at most ``width`` columns.
    """
    source = f"{hook.calls} {hook.source}"
    if is_first:
        origin = f", {one_line(hook.defined_in)}" if hook.defined_in else ""
        return [f"{hook.title}{hook.trigger}{origin}", source, *hook.effects]
    head = f"{one_line(hook.hook)}{hook.trigger}"
    line = f"{head}: {source}"
    return [line] if len(line) <= width else [head, source]


def _quoted(*lines: str) -> str:
    """Return a quoted Mermaid label; all but plain characters are escaped.

    >>> _quoted('say "hi"', "<b>")
    '"say #34;hi#34;<br/>#60;b#62;"'
    """
    escaped = (_SPECIAL.sub(lambda found: f"#{ord(found[0])};", line) for line in lines)
    return f'"{"<br/>".join(escaped)}"'


logger = job_logger(__name__)

PLAN_FILE = "plan.json"
_MAX_RESUMES = 20
_MAX_DEPTH = 8
_MAX_LOGGED = 12
_LONGEST_TEXT = 300
_ABSENT = "not there"


@dataclass(frozen=True, slots=True)
class PlanChange:
    """Difference of one hook, or of the order on one channel, between two plans.

    Attributes:
        what: Name of the hook, or ``order on <channel>``.
        before: What only the earlier plan has; likewise ``after``.
    """

    what: str
    before: str
    after: str

    @classmethod
    def of(cls, *texts: str) -> PlanChange:
        """Return a change of bounded texts; an empty text stands for an absent hook."""
        return cls(*(text[:_LONGEST_TEXT] or _ABSENT for text in texts))

    def __str__(self) -> str:
        return one_line(f"{self.what}: {self.before} -> {self.after}")


def write_plan(folder: Path, plan: RunPlan, step: int, events: EventLog) -> None:
    """Write plan.json; log the changes since the last start of a run that continues.

    A plan that can't be written or compared is a warning.

    Args:
        folder: run folder.
        plan: plan of this start.
        step: completed steps; 0 for a new run.
        events: receives the changes as an event ``plan changed``.
    """
    document = plan.to_dict()
    resumes, changes = list[dict[str, Any]](), list[PlanChange]()
    if step:
        try:
            saved = _read(folder / PLAN_FILE)
            resumes = [each for each in _items(saved.get("resumes")) if isinstance(each, dict)]
            changes = compare_plans(_items(saved.get("hooks")), document["hooks"])
        except FileNotFoundError:
            pass  # the first start with this folder
        except (OSError, StateError, JsonError) as error:
            logger.warning("the hooks are not compared with those of the last start: %s", error)
    if changes:
        announce(logger, "the hooks differ from those of the last start:")
        for change in changes[:_MAX_LOGGED]:
            announce(logger, f"  {change}")
        if len(changes) > _MAX_LOGGED:
            announce(logger, f"  and {len(changes) - _MAX_LOGGED} more, see {PLAN_FILE}")
        events.add("plan changed", "; ".join(map(str, changes)))
        at = datetime.now(UTC).isoformat(timespec="seconds")
        resumes.append({"at": at, "step": step, "changes": [*map(asdict, changes)]})
    document["resumes"] = resumes[-_MAX_RESUMES:]
    try:
        make_folder(folder)
        remove_leftovers(folder / PLAN_FILE)
        replace_file(folder / PLAN_FILE, json.dumps(document, indent=1).encode() + b"\n")
    except OSError as error:
        logger.warning("the plan of the run can't be written: %s", error)


def compare_plans(before: Iterable[Any], after: Iterable[Any]) -> list[PlanChange]:
    """Return the changes between the hooks of two plans, as plain data.

    Compared are classes, triggers, ``before`` and ``after``, order and declarations; source lines
    are not.

    >>> old = [{"channel": "on_step", "hook": "log", "when": "50 steps", "after": "log.py:3"}]
    >>> new = [{"channel": "on_step", "hook": "log", "when": "10 steps", "after": "log.py:9"}]
    >>> print(*compare_plans(old, new))
    log: on_step after, 50 steps -> on_step after, 10 steps
    """
    old, new = _Described.of(before), _Described.of(after)
    changes = []
    for name in {**old.hooks, **new.hooks}:
        sides = old.hooks.get(name, {}), new.hooks.get(name, {})
        keys = [key for key in {**sides[0], **sides[1]} if sides[0].get(key) != sides[1].get(key)]
        # The plan has the effects of a new hook; plans of an earlier version have none.
        if not all(sides) or sides[0].keys().isdisjoint(EFFECTS):
            keys = [key for key in keys if key not in EFFECTS]
        if keys:
            texts = ("; ".join(side[key] for key in keys if key in side) for side in sides)
            changes.append(PlanChange.of(name, *texts))
    for channel, names in old.order.items():
        common = [name for name in names if name in new.order.get(channel, ())]
        moved = [name for name in new.order.get(channel, ()) if name in names]
        if common != moved:
            while common[0] == moved[0]:
                del common[0], moved[0]
            while common[-1] == moved[-1]:
                del common[-1], moved[-1]
            order = ", ".join(common), ", ".join(moved)
            changes.append(PlanChange.of(f"order on {channel}", *order))
    return changes


@dataclass(frozen=True, slots=True)
class _Described:
    """Texts of each hook by class, channel and effect, and the names of hooks on each channel."""

    hooks: dict[str, dict[str, str]]
    order: dict[str, list[str]]

    @classmethod
    def of(cls, hooks: Iterable[Any]) -> _Described:
        found, order = dict[str, dict[str, str]](), dict[str, list[str]]()
        for hook in hooks:
            if not isinstance(hook, dict):
                continue
            name, channel = str(hook.get("hook")), str(hook.get("channel"))
            texts = found.setdefault(name, {"class": f"class {hook.get('class_name')}"})
            calls = " and ".join(role for role in ("before", "after") if hook.get(role))
            entry = f"{channel} {calls}, {hook.get('when')}"
            texts[channel] = f"{texts[channel]}; {entry}" if channel in texts else entry
            for effect in EFFECTS:
                if effect in hook:
                    names = hook[effect]
                    known = names if isinstance(names, list | tuple) else ["not declared"]
                    texts[effect] = f"{effect} {', '.join(map(str, known)) or 'nothing'}"
            if name not in (names_on := order.setdefault(channel, [])):
                names_on.append(name)
        return cls(found, order)


def _read(path: Path) -> dict[str, Any]:
    found = parse_json(read_bounded(path), max_depth=_MAX_DEPTH)
    if not isinstance(found, dict):
        raise StateError(f"{path} is no plan: expected a mapping, found {type(found).__name__}")
    return found


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
