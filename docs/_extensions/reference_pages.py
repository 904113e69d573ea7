"""Pages of the reference that are generated from the code, at each build.

A page of ``reference/`` has a title, an introduction, and a line with a comment ``generated: NAME``
that a function of this module replaces, in Markdown. The pages of the API are generated completely.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import annotated_types
import click
from pydantic import BaseModel
from python_names import error_classes, exported, modules, public_modules, public_name
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer

from robo_orchard_core.utils.cli import options_of
from robo_orchard_core.utils.config import Config, FieldsOf
from robo_orchard_core.utils.config.parts import config_class_of
from robo_orchard_core.utils.logging import one_line
from robo_orchard_lab.cli.errors import ExitCode, exit_code_of
from robo_orchard_lab.cli.main import COMMANDS
from robo_orchard_lab.cli.output import PROGRAM, readable_yaml
from robo_orchard_lab.experiment.inspection import FieldHelp, fields_of, hook, hook_names
from robo_orchard_lab.experiment.parts import (
    ExperimentFields,
    LRSchedulerConfig,
    OnResume,
    OptimizerConfig,
)

SOURCES = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"^.*<!-- generated: (\w+) -->$", re.M)
PARTS = {"optimizer": OptimizerConfig, "lr_scheduler": LRSchedulerConfig}
"""Fields of a part that each class of the part has."""


# Markdown of one object.


def field_entry(name: str, help_: FieldHelp, metadata: Iterable[Any] = ()) -> str:
    """Return an entry for a field: name, type, default, range, effect on a resume, description."""
    default = "" if help_.default is None else f" = {help_.default}"
    notes = [
        note for note in ("required" if help_.default is None else "", range_of(metadata)) if note
    ]
    notes += [_resume_note(rule) for rule in metadata if isinstance(rule, OnResume)]
    text = f"{help_.description}\n\n" if help_.description else ""
    lines = text + (f"*{'; '.join(notes)}*\n" if notes else "")
    return f"```{{field}} {name}: {help_.type}{default}\n{lines}```\n"


def range_of(metadata: Iterable[Any]) -> str:
    """Return the admitted values of a field in words, such as ``at least 1``.

    >>> range_of([annotated_types.Ge(0), annotated_types.Lt(1)])
    'at least 0, less than 1'
    """
    words = []
    for rule in metadata:
        match rule:
            case annotated_types.Ge():
                words.append(f"at least {rule.ge}")
            case annotated_types.Gt():
                words.append(f"more than {rule.gt}")
            case annotated_types.Le():
                words.append(f"at most {rule.le}")
            case annotated_types.Lt():
                words.append(f"less than {rule.lt}")
            case annotated_types.MinLen() if rule.min_length == 1:
                words.append("not empty")
            case annotated_types.MinLen():
                words.append(f"at least {rule.min_length} entries")
            case annotated_types.MaxLen():
                words.append(f"at most {rule.max_length} entries")
    return ", ".join(words)


def _resume_note(rule: OnResume) -> str:
    effects = {
        "harmless": "may change on a resume",
        "trajectory": "a change on a resume needs `--allow trajectory`",
        "impossible": "can't change on a resume",
    }
    return effects[rule.effect] + (f": {rule.why}" if rule.why else "")


def class_fields(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the entries of all fields of a config class."""
    metadata = {".".join(option.path): option.field.metadata for option in options_of(cls)}
    for field in fields_of(cls):
        yield field_entry(f"{prefix}{field.path}", field, metadata[field.path])


# Fields of experiment files.


def fields() -> str:
    """Return all fields of experiment files by the part that they belong to."""
    from robo_orchard_lab.experiment.schema import experiment_schema

    in_files = experiment_schema({})["$defs"]["ExperimentConfig"]["properties"]
    lines = ["## The file\n"]
    lines += [
        field_entry(name, FieldHelp(name, in_files[name]["description"], "str", "null"))
        for name in ("base", "$schema")
    ]
    metadata = {".".join(o.path): o.field.metadata for o in options_of(ExperimentFields)}
    described = {field.path: field for field in fields_of(ExperimentFields)}
    own = [path for path in described if "." not in path]
    groups = dict.fromkeys(path.partition(".")[0] for path in described if "." in path)
    lines += [field_entry(path, described[path], metadata[path]) for path in own]
    seen: dict[type, str] = {}
    for path, cls in nested_configs(ExperimentFields):  # those with fields above
        if path in groups:
            seen[cls] = path
            inner = [(f"{path}.{name}", inner) for name, inner in nested_configs(cls)]
            seen |= {cls: at for at, cls in inner if any(d.startswith(f"{at}.") for d in described)}
    for group in groups:
        lines.append(f"## `{group}`\n")
        lines += [
            field_entry(path, field, metadata[path])
            for path, field in described.items()
            if path.startswith(f"{group}.")
        ]
        (cls,) = (cls for cls, path in seen.items() if path == group)
        for name, field in cls.model_fields.items():  # type: ignore[attr-defined]  # of a config
            lines += _nested(field.annotation, f"{group}.{name}", seen)
    for name in own:
        lines += _nested(ExperimentFields.model_fields[name], name, seen)
    return "\n".join(lines)


def _nested(declaration: Any, path: str, seen: dict[type, str]) -> Iterator[str]:
    """Yield sections of the configs that a field holds in a mapping, a list or a choice."""
    found = dict(nested_configs_of(declaration, path))
    if path in PARTS:
        found[path] = PARTS[path]
    for inner, cls in found.items():
        if inner in seen.values():
            continue
        if cls in seen:
            yield f"The fields of `{inner}` are those of `{seen[cls]}`.\n"
            continue
        seen[cls] = inner
        yield f"## `{inner}`\n\n{_first_sentence(cls)}\n"
        yield from class_fields(cls, f"{inner}.")
        for name, field in cls.model_fields.items():
            yield from _nested(field.annotation, f"{inner}.{name}", seen)


def nested_configs(cls: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield path and class of the configs that the fields of a config class hold."""
    for name, field in cls.model_fields.items():
        yield from nested_configs_of(field, name)


def nested_configs_of(declaration: Any, path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield path and class of each config in a declaration; ``NAME`` stands for a key."""
    annotation = getattr(declaration, "annotation", declaration)
    for marker in getattr(declaration, "metadata", ()) or getattr(annotation, "__metadata__", ()):
        if isinstance(marker, FieldsOf):
            yield path, marker.config_class
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield path, annotation
    is_by_name = getattr(annotation, "__origin__", None) is dict
    for argument in get_args(annotation):
        yield from nested_configs_of(argument, f"{path}.NAME" if is_by_name else path)


# Hooks, sinks, channels, requests.


def hooks() -> str:
    """Return all hooks that a file may name, with effects and fields."""
    from robo_orchard_lab.pipeline.hook_set import PipelineHooks
    from robo_orchard_lab.pipeline.hooks import optimizer

    table, lines = ["| hook | does |", "|---|---|"], []
    for name in hook_names():
        info = hook(name)
        cls: Any = importlib.import_module(info.reference.partition(":")[0])
        cls = getattr(cls, name)
        table.append(f"| [`{name}`](#{name.lower()}) | {_cell(info.summary)} |")
        lines.append(f"## `{name}`\n\n{info.summary}\n\n{_linked(info.description)}\n")
        config = config_class_of(cls).__name__
        lines.append(f"Configuration: {{py:class}}`~{_module_of(cls)}.{config}`.\n")
        lines += [f"- {line}" for line in _effects(info.channels, info.effects, cls)]
        lines.append("")
        lines += class_fields(config_class_of(cls), f"{name}.")
        entry = textwrap.indent(_yaml(name, info.example), "  ")
        lines.append(f"In a file:\n\n```yaml\nhooks:\n{entry}```\n")
    for cls in (optimizer.OptimizerHook, optimizer.NamedOptimizersHook):
        assert issubclass(cls, PipelineHooks)
        table.append(f"| `{cls.__name__}` | {_cell(_first_sentence(cls))} |")
    table.append("")
    return "\n".join([*table, *lines])


def _effects(channels: Iterable[str] | None, effects: Iterable[str], cls: Any) -> Iterator[str]:
    if channels:
        yield f"Runs on {', '.join(f'`{channel}`' for channel in channels)}."
    for effect in effects:
        yield f"{effect[0].upper()}{effect[1:]}."
    if isinstance(published := getattr(cls, "published_metrics", None), list | tuple) and published:
        yield f"Publishes {', '.join(f'`{name}`' for name in published)}."
    changes = "never" if cls.keeps_trajectory else "may"
    yield f"Its settings {changes} change the trained weights."


def sinks() -> str:
    """Return all sinks, with their fields."""
    from robo_orchard_lab.pipeline import sinks as package

    lines = []
    for name in package.__all__:
        config = getattr(package, f"{name}Config", None)
        if config is not None:
            lines.append(f"## `{name}`\n\n{_markdown(inspect.getdoc(getattr(package, name)))}\n")
            lines += class_fields(config, f"{name}.")
    return "\n".join(lines)


def trackers() -> str:
    """Return the trackers that Accelerate knows, with their packages."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    rows = [
        f"| `{name}` | {{py:class}}`accelerate.tracking.{cls.__name__}` |"
        for name, cls in LOGGER_TYPE_TO_CLASS.items()
    ]
    return "\n".join(["| name in `trackers` | class |", "|---|---|", *rows])


def channels() -> str:
    """Return the channels, and the fields and methods of the argument of hooks."""
    from robo_orchard_lab.pipeline import PipelineHookArgs
    from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES, PIPELINE_CHANNELS
    from robo_orchard_lab.pipeline.requests import Requests

    lines = ["## Channels\n"]
    for channel in PIPELINE_CHANNELS:
        within = f" Inside of `{channel.parent}`." if channel.parent else ""
        around = channel.around[0].upper() + channel.around[1:]
        lines.append(f"```{{channel}} {channel.name}\n{around}.{within}\n```\n")
    lines.append("## Fields of `args`\n")
    for name, kind, text in argument_fields():
        valid = PipelineHookArgs.channels_of(name)
        where = "all channels" if valid == CHANNEL_NAMES else ", ".join(f"`{v}`" for v in valid)
        access = "hooks may assign it" if PipelineHookArgs.is_assignable(name) else "read-only"
        body = f"{_markdown(text)}\n\n*Valid in {where}; {access}.*"
        lines.append(f"```{{field}} args.{name}: {kind}\n{body}\n```\n")
    lines += _methods("Methods of `args`", "args", PipelineHookArgs, ("begin_entry", "failing"))
    lines += _methods("Requests", "args.requests", Requests, ("pop", "pop_rollback", "listen"))
    return "\n".join(lines)


def argument_fields() -> Iterator[tuple[str, str, str]]:
    """Yield name, type and description of each public field of the argument of hooks."""
    from robo_orchard_lab.pipeline.context import PipelineHookArgs

    comments = ModuleAnalyzer.for_module(PipelineHookArgs.__module__).find_attr_docs()
    for name, annotation in PipelineHookArgs.__annotations__.items():
        if not name.startswith("_"):
            comment = comments[PipelineHookArgs.__name__, name]
            yield name, annotation, "\n".join(comment)
    for name, member in vars(PipelineHookArgs).items():
        if isinstance(member, property) and name != "is_filler":
            yield name, member.fget.__annotations__["return"], inspect.getdoc(member) or ""


def _methods(title: str, owner: str, cls: type, engine: Iterable[str]) -> Iterator[str]:
    """Yield entries of the public methods, except those that only the engine calls."""
    yield f"## {title}\n"
    for name, function in vars(cls).items():
        if inspect.isfunction(function) and not name.startswith("_") and name not in engine:
            parameters = [*inspect.signature(function).parameters.values()][1:]
            signature = inspect.Signature(parameters)
            text = _markdown(inspect.getdoc(function))
            yield f"```{{field}} {owner}.{name}{signature}\n{text}\n```\n"


# Commands and errors.


def commands() -> str:
    """Return all commands, with help text, usage and options."""
    lines = []
    for section, found in COMMANDS.items():
        lines.append(f"## {section}\n")
        for name, (_, reference) in found.items():
            module, _, attribute = reference.partition(":")
            command = getattr(importlib.import_module(module), attribute)
            lines += _command(command, [PROGRAM, name])
    return "\n".join(lines)


def _command(command: click.Command, words: list[str]) -> Iterator[str]:
    name = " ".join(words)
    context = click.Context(command, info_name=name)
    yield f"### `{name}`\n"
    yield f"```{{command}} {name} {' '.join(command.collect_usage_pieces(context))}\n"
    yield f"{_help_text(command.help or '')}\n```\n"
    yield f"```{{program}} {name}\n```\n"
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            record = parameter.get_help_record(context)
            if record is not None:
                flags, text = record
                yield f"```{{option}} {flags}\n{_escaped(text)}\n```\n"
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            yield from _command(found, [*words, inner])


def _help_text(text: str) -> str:
    """Return a help text of click in Markdown: a block that starts with ``\\b`` is code."""
    blocks = []
    for block in inspect.cleandoc(text).split("\n\n"):
        if block.startswith("\b"):
            code = textwrap.dedent(block.removeprefix("\b\n"))
            blocks.append(f"~~~text\n{code}\n~~~")
        else:
            blocks.append(_escaped(block))
    return "\n\n".join(blocks)


def errors() -> str:
    """Return all classes of errors, with the exit code of a command and their meaning."""
    lines = []
    for cls in error_classes().values():
        bases = ", ".join(f"`{base.__name__}`" for base in cls.__bases__)
        text = _markdown((inspect.getdoc(cls) or "").partition("\nArgs:")[0])
        body = f"{text}\n\n*A {bases}, of `{_module_of(cls)}`. Exit code: {_exit_code(cls)}.*"
        lines.append(f"```{{error}} {cls.__name__}\n{body}\n```\n")
    return "\n".join(lines)


def _exit_code(cls: type[BaseException]) -> str:
    special = {
        "RunPreempted": "its own, such as 143 for SIGTERM and 75 for a time limit",
        "CommandError": "2, or 1 if the command has begun",
        "UnknownMetricError": "2 before the first step, for a setting; else 1",
    }
    return special.get(cls.__name__) or str(int(exit_code_of(cls.__new__(cls))))


def exit_codes() -> str:
    """Return the exit codes of the program."""
    comments = ModuleAnalyzer.for_module(ExitCode.__module__).find_attr_docs()
    rows = []
    for code in ExitCode:
        comment = " ".join(comments.get(("ExitCode", code.name), ["Success."])).strip()
        rows.append(f"| {int(code)} | `ExitCode.{code.name}` | {comment} |")
    return "\n".join(["| code | name | meaning |", "|---|---|---|", *rows])


# The API.


def write_api_pages(app: Sphinx) -> None:
    """Write a page for each module that exports names; autodoc fills it."""
    folder = SOURCES / "api"
    folder.mkdir(exist_ok=True)
    for module in public_modules():
        text = "".join(_api_page(module))
        file = folder / f"{module.__name__}.rst"
        if not file.exists() or file.read_text("utf-8") != text:  # else it is not built again
            file.write_text(text, "utf-8")


def _api_page(module: Any) -> Iterator[str]:
    title = module.__name__
    yield f"{title}\n{'=' * len(title)}\n\n.. automodule:: {title}\n.. py:currentmodule:: {title}\n"
    elsewhere = []
    for name in module.__all__:
        value, public = getattr(module, name), f"{title}.{name}"
        if public not in exported():
            elsewhere.append((name, public_name(value)))
        elif isinstance(value, type):
            kind = "exception" if issubclass(value, BaseException) else "class"
            yield f"\n.. auto{kind}:: {public}\n   :members:\n"
        elif inspect.isfunction(value):
            yield f"\n.. autofunction:: {public}\n"
        else:
            comment = textwrap.indent("\n".join(_comment(name, value)), "   ")
            yield f"\n.. py:data:: {name}\n\n{comment}\n"
    if elsewhere:
        yield "\nThe module also exports:\n\n"
        for name, public in elsewhere:
            alias = "" if public is None or public.endswith(f".{name}") else f"{name}, an alias of "
            yield f"- {alias}:py:obj:`{public}`\n"


def _comment(name: str, value: Any) -> list[str]:
    """Return the text below the definition of a constant or type."""
    for module in modules():
        if getattr(module, name, None) is value:
            comment = ModuleAnalyzer.for_module(module.__name__).find_attr_docs().get(("", name))
            if comment:
                return comment
    return [f"``{one_line(str(value))}``"]


def api() -> str:
    """Return the list of the pages of the API, with a sentence for each."""
    pages, rows = [], ["| module | has |", "|---|---|"]
    for module in sorted(public_modules(), key=lambda module: module.__name__):
        name = module.__name__
        pages.append(f"{name.partition('.')[2]} <../api/{name}>")
        rows.append(f"| [`{name}`](../api/{name}.rst) | {_cell(_first_sentence(module))} |")
    tree = "\n".join(pages)
    return "\n".join([*rows, "", f"```{{toctree}}\n:hidden:\n\n{tree}\n```"])


# Text.


def _first_sentence(value: Any) -> str:
    return _markdown((inspect.getdoc(value) or "").partition("\n\n")[0])


def _markdown(text: str | None) -> str:
    """Return a docstring in Markdown: roles become code, doctests and literal blocks fenced."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text or "").replace("``", "`")
    blocks, sections = [], ("Args:", "Raises:", "Returns:", "Attributes:", "Yields:")
    literal = False
    for block in text.split("\n\n"):
        if block.startswith(">>>"):
            blocks.append(f"~~~python\n{block}\n~~~")
        elif literal and block.startswith("    "):
            blocks.append(f"~~~text\n{textwrap.dedent(block)}\n~~~")
        elif block.startswith(sections):
            head, _, rest = block.partition("\n")
            items = re.sub(r"^(\*?\w+):", r"- `\1`:", textwrap.dedent(rest), flags=re.M)
            blocks.append(f"{head}\n\n{items}")
        else:
            blocks.append(block)
        literal = block.endswith("::")
        if literal:
            blocks[-1] = blocks[-1][:-1]
    return "\n\n".join(blocks)


def _linked(text: str) -> str:
    """Return text with links to the pages of docs/ that it names."""
    return re.sub(r"docs/(\w+/(\w+)\.md)", r"[\2](../\1)", text)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _escaped(text: str) -> str:
    return re.sub(r"([*<])", r"\\\1", text)


def _module_of(cls: type) -> str:
    """Return the public module of a class, or else the one that defines it."""
    public = public_name(cls)
    return cls.__module__ if public is None else public.rpartition(".")[0]


def _yaml(name: str, example: Any) -> str:
    key = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.removesuffix("Hook")).lower()
    return readable_yaml({key: example})


# Sphinx.


def _fill(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname.startswith("reference/"):
        functions: dict[str, Callable[[], str]] = {
            f.__name__: f
            for f in (api, channels, commands, errors, exit_codes, fields, hooks, sinks, trackers)
        }
        source[0] = MARKER.sub(lambda found: functions[found[1]](), source[0])


def _parse(env: BuildEnvironment, signature: str, node: addnodes.desc_signature) -> str:
    """Render ``name: type = default`` or ``name(parameters)``; return the name."""
    name = re.match(r"[^\s:(\[]+(?: [a-z][\w-]*)*", signature)[0]  # type: ignore[index]
    node += addnodes.desc_name(name, name)
    rest = signature[len(name) :]
    if rest:
        node += addnodes.desc_annotation(rest, rest)
    return name


def setup(app: Sphinx) -> dict[str, bool]:
    for kind in ("field", "channel", "command", "error"):
        app.add_object_type(kind, kind, parse_node=_parse, objname=kind)
    app.connect("builder-inited", write_api_pages)
    app.connect("source-read", _fill, priority=100)  # before links are moved
    return {"parallel_read_safe": True, "parallel_write_safe": True}
