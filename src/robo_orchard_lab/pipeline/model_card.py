"""Model card: README.md of an exported model, with the metadata that the Hugging Face Hub reads.

The card has results, use, data, command, versions and configuration. It has no environment
variables, no tokens and no home folders, see `shareable_text`.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, field_validator

from robo_orchard_core.utils.config import Config, ConfigError
from robo_orchard_core.utils.config.formats import read, write_yaml
from robo_orchard_core.utils.shareable_text import shareable, shareable_text

CARD_FILE = "README.md"
PROJECT = "robo-orchard-hooks"
_PROGRAM = "robo-orchard-lab"
_MARK = (
    f"<!-- Written by {PROJECT}. Without this line, an export keeps this file as you edited it. -->"
)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_MAX_METRICS = 100
_MAX_CONFIGURATION = 200_000  # characters
_NOT_MEASURED = ("perf/", "lr/", "time/", "system/")


class ModelCardConfig(Config):
    """Fields of a model card that only its author knows.

    >>> ModelCardConfig(license="apache-2.0", tags=["robotics"]).language is None
    True
    """

    license: str | None = Field(
        default=None,
        description="License of the weights by its name on the Hub, such as apache-2.0 or mit.",
    )
    name: str | None = Field(
        default=None, min_length=1, description="Name of the model; by default that of the run."
    )
    tags: list[str] = Field(default_factory=list, description="Further tags, such as robotics.")
    language: str | None = Field(
        default=None, description="Language of the data, such as en, where it has one."
    )

    @field_validator("license")
    @classmethod
    def _is_identifier(cls, value: str | None) -> str | None:
        if value is not None and not _LICENSE.fullmatch(value):
            raise ValueError(
                f"expected an identifier such as apache-2.0 or mit, found {value!r}; "
                "https://hf.co/docs/hub/repositories-licenses lists them"
            )
        return value

    @field_validator("language")
    @classmethod
    def _is_language(cls, value: str | None) -> str | None:
        if value is not None and not _LANGUAGE.fullmatch(value):
            raise ValueError(f"expected an ISO 639 code such as en, found {value!r}")
        return value


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Content of a model card.

    Attributes:
        name: Name of the model, unless its author or the experiment file has one.
        model: Class, such as ``my_team.models:Net``; empty if unknown.
        parameters: Number of parameters.
        library: Library that loads the folder, such as ``transformers``.
        usage: Python code that loads the folder.
        progress: Counters of the run.
        metrics: Values measured on these weights.
        about: Configuration, command, versions and git state, as of a checkpoint's metadata.
        experiment: Experiment file of the run, as YAML; empty for a script.
    """

    name: str
    model: str
    parameters: int
    library: str
    usage: str
    progress: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    experiment: str = ""


def model_card(facts: ModelFacts, card: ModelCardConfig | None = None) -> str:
    """Return the card of a model: YAML front matter and Markdown."""
    card = ModelCardConfig() if card is None else card
    document = _document(facts.experiment)
    name = card.name or str(document.get("name") or facts.name)
    sections = [
        _front_matter(facts, card, name),
        f"# {_line(name)}",
        _summary(facts),
        *_results(facts.metrics),
        f"## Use\n\n{_fenced(facts.usage, 'python')}",
        *_data(facts, document),
        *_training(facts),
        _MARK,
    ]
    return shareable_text("\n\n".join(sections) + "\n")


def is_own_card(text: str) -> bool:
    """Return True for a card that an export may replace: its author has not taken it over."""
    return _MARK in text


def _front_matter(facts: ModelFacts, card: ModelCardConfig, name: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # comes with accelerate; costs 0.2 s

    is_robotics = facts.library == "lerobot" or ".policy" in facts.model
    tags = [PROJECT, *(["robotics"] if is_robotics else []), *card.tags]
    results = [
        EvalResult(
            task_type="robotics" if is_robotics else "other",
            dataset_type=data,
            dataset_name=data,
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for data, metric, value in _evaluations(facts.metrics)
    ]
    data = ModelCardData(
        license=card.license,
        language=card.language,
        library_name=facts.library,
        pipeline_tag="robotics" if is_robotics else None,
        tags=list(dict.fromkeys(tags)),
        model_name=name,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _evaluations(metrics: Mapping[str, float]) -> Iterator[tuple[str, str, float]]:
    """Yield data, metric and value of evaluations, from names such as ``eval/val/loss``."""
    for name, value in _measured(metrics).items():
        parts = name.split("/")
        if parts[0] == "eval" and len(parts) > 1:
            data, metric = (parts[1], "/".join(parts[2:])) if len(parts) > 2 else ("eval", parts[1])
            yield data, metric, float(f"{value:.6g}")


def _measured(metrics: Mapping[str, float]) -> dict[str, float]:
    return {
        name: value
        for name, value in [*metrics.items()][:_MAX_METRICS]
        if math.isfinite(value) and not name.startswith(_NOT_MEASURED)
    }


def _summary(facts: ModelFacts) -> str:
    kind = f"`{facts.model.replace(':', '.')}`" if facts.model else "A model"
    size = f" with {facts.parameters:,} parameters" if facts.parameters else ""
    counts = (("epoch_id", "epoch"), ("global_step_id", "step"))
    done = [
        f"{count:,} {unit}{'' if count == 1 else 's'}"
        for counter, unit in counts
        if (count := facts.progress.get(counter, 0))
    ]
    trained = f", after {' and '.join(done)}" if done else ""
    return f"{kind}{size}, trained with {PROJECT}{trained}."


def _results(metrics: Mapping[str, float]) -> Iterator[str]:
    rows = [f"| {_line(name)} | {value:.6g} |" for name, value in _measured(metrics).items()]
    if rows:
        yield "\n".join(["## Results\n", "| metric | value |", "|---|---|", *rows])


def _document(experiment: str) -> Mapping[str, Any]:
    with suppress(ConfigError):  # the run reports a damaged file
        found = read(experiment, "yaml") if experiment else {}
        if isinstance(found, dict):
            return found
    return {}


def _data(facts: ModelFacts, document: Mapping[str, Any]) -> Iterator[str]:
    configuration = facts.about.get("configuration")
    if isinstance(data := document.get("data"), dict):
        yield f"## Data\n\n{_fenced(write_yaml({'data': _without_nulls(data)}), 'yaml')}"
    elif isinstance(configuration, Mapping) and configuration.get("dataloader"):
        yield f"## Data\n\nFrom a `{_line(configuration['dataloader'])}`."


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return value


def _training(facts: ModelFacts) -> Iterator[str]:
    about = facts.about
    lines = []
    if command := about.get("command"):
        lines.append(_fenced(shareable_command(str(command)), "bash"))
    rows = [f"| {_line(k)} | {_line(v)} |" for k, v in (about.get("versions") or {}).items()]
    git = about.get("git")
    if isinstance(git, Mapping) and git.get("commit"):
        changed = ", with uncommitted changes" if git.get("changed") else ""
        rows.append(f"| git commit | {_line(git['commit'])}{changed} |")
    if rows:
        lines.append("\n".join(["| package | version |", "|---|---|", *rows]))
    kind, configuration = "yaml", facts.experiment
    if not configuration and about.get("configuration"):
        plain = shareable(about["configuration"])
        kind, configuration = "json", json.dumps(plain, indent=2, default=str)
    if configuration:
        if len(configuration) > _MAX_CONFIGURATION:
            configuration = configuration[:_MAX_CONFIGURATION] + "\n... cut\n"
        block = _fenced(configuration, kind)
        lines.append(f"<details>\n<summary>Configuration</summary>\n\n{block}\n\n</details>")
    if lines:
        yield "\n\n".join(["## Training", *lines])


def shareable_command(command: str) -> str:
    """Return a command without secrets and home folders, its program by name.

    >>> shareable_command("/home/anna/env/bin/python train.py --data /home/anna/robots")
    'python train.py --data ~/robots'
    >>> shareable_command("/usr/bin/python3 /opt/env/bin/robo-orchard-lab train digits.yaml")
    'robo-orchard-lab train digits.yaml'
    """
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that nobody closed
        words = command.split()
    inside = os.getcwd() + os.sep
    words = [word.replace(inside, "") for word in words]
    # The program, and an installed script that Python runs.
    for index in range(min(2, len(words))):
        if index == 0 or re.match(r"/|[A-Za-z]:\\", words[index]):
            words[index] = words[index].replace("\\", "/").rpartition("/")[2]
    if len(words) > 1 and words[0].startswith("python") and words[1] == _PROGRAM:
        del words[0]
    return shareable_text(shlex.join(words))


def _line(value: Any) -> str:
    """Return a value as text of one line that ends no cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")


def _fenced(text: str, kind: str) -> str:
    """Return text as a block of code that the text can't end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{text.strip()}\n{fence}"
