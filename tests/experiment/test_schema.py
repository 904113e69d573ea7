"""The JSON Schema of experiment files agrees with the loader."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from pydantic import ValidationError
from tests.experiment.hook_entries import NAMED, TRUST, experiment

from robo_orchard_core.utils.config import Config, ConfigError, ConfigReferenceError
from robo_orchard_core.utils.config.formats import read
from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.experiment.catalogue import CATALOGUE
from robo_orchard_lab.experiment.schema import experiment_schema
from robo_orchard_lab.pipeline import PipelineHooks, PipelineHooksConfig, hooks


@cache
def schema() -> dict[str, Any]:
    return experiment_schema()


@cache
def validator() -> Draft202012Validator:
    return Draft202012Validator(schema())


@cache
def quick_validator() -> Draft202012Validator:
    """Return a ten times faster validator of the hook entries' names only."""
    needed = ("MulticlassAccuracy", "CrossEntropyLoss", "DataLoader", "SGD")
    names = {
        name: place
        for name, place in CATALOGUE.items()
        if place.startswith("robo_orchard_lab.") or place.endswith(needed)
    }
    return Draft202012Validator(experiment_schema(names))


def refused_at(document: Any, by: Draft202012Validator | None = None) -> str | None:
    """Return the path of the schema error, or None."""
    error = best_match((by or validator()).iter_errors(document))
    return None if error is None else ".".join(map(str, error.absolute_path))


def changed(document: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(document)
    inner: Any = document
    *above, last = place.split(".")
    for key in above:
        inner = inner[int(key)] if isinstance(inner, list) else inner.setdefault(key, {})
    inner[int(last) if isinstance(inner, list) else last] = value
    return document


def load(document: dict[str, Any]) -> ExperimentConfig:
    return ExperimentConfig.from_dict(document, trust=TRUST)


def test_schema_is_valid_and_below_one_megabyte() -> None:
    """The schema is valid in its dialect and smaller than a megabyte."""
    Draft202012Validator.check_schema(schema())
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert len(json.dumps(schema())) < 2**20


def builtin_hooks() -> Iterator[tuple[str, type[Config]]]:
    for name in hooks.__all__:
        found = getattr(hooks, name)
        if isinstance(found, type) and issubclass(found, PipelineHooksConfig):
            yield found.model_fields["class_type"].default.__name__, found


@pytest.mark.parametrize(("name", "config"), [*builtin_hooks()])
def test_every_field_of_every_hook_is_in_the_schema(name: str, config: type[Config]) -> None:
    """Each built-in hook has each form of its name, its fields and their descriptions."""
    definitions = schema()["$defs"]
    names = definitions["class_type.PipelineHooks"]["anyOf"][0]["enum"]
    assert {key for key, place in CATALOGUE.items() if place == CATALOGUE[name]} <= {*names}
    properties = definitions[name]["properties"]
    assert properties.keys() - {"config_type"} == config.model_fields.keys()
    for field, declared in config.model_fields.items():
        if field != "class_type":
            assert properties[field]["description"] == declared.description


@pytest.mark.parametrize(("name", "entry"), NAMED, ids=[name for name, _ in NAMED])
def test_entries_of_hooks_pass(name: str, entry: dict[str, Any]) -> None:
    """Entries that set every field of a hook pass, with each form of the name."""
    spellings = [key for key, place in CATALOGUE.items() if place == CATALOGUE[name]]
    assert len(spellings) == 3
    for spelling in spellings:
        document = experiment(it={"class_type": spelling, **entry})
        assert refused_at(document) is None


@pytest.mark.parametrize(
    "path",
    ["examples/digits/digits.yaml", "src/robo_orchard_lab/cli/starting_file.yaml"],
)
def test_files_of_this_project_pass(path: str) -> None:
    """The digits example and the file written by `config init` pass."""
    text = (Path(__file__).parents[2] / path).read_text("utf-8")
    assert refused_at(read(text, "yaml")) is None


def test_written_configs_pass() -> None:
    """The serialized config of an experiment with all hooks passes."""
    document = experiment(
        **{f"{name} {n}": {"class_type": name, **entry} for n, (name, entry) in enumerate(NAMED)}
    )
    assert refused_at(load(document).to_dict()) is None


ANYTHING: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, 3, -1.5, "", "text", "3 steps", [], ["a"], [1], {}, {"a": 1}, {"a": []}]
)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_types_refused_by_the_loader_are_refused(data: st.DataObject) -> None:
    """A value of a type refused by the loader is refused at the same path."""
    name, entry = data.draw(st.sampled_from(NAMED))
    fields = data.draw(st.lists(st.sampled_from([*entry]), unique=True))
    document = experiment(it={"class_type": name, **{key: entry[key] for key in fields}})
    field = data.draw(st.sampled_from([*entry]))
    document["hooks"]["it"][field] = data.draw(ANYTHING)
    try:
        load(document)
    except ConfigError as error:
        cause = error.__cause__
        own = isinstance(cause, ValidationError) and any(
            details["type"] not in ("value_error", "missing") for details in cause.errors()
        )
        event(f"of another type: {own}")
        if own:
            assert refused_at(document, quick_validator()) is not None
    else:
        # The loader converts texts to numbers and numbers to bools; the schema requires the type.
        lax = document["hooks"]["it"][field]
        assert isinstance(lax, bool | int | str) or refused_at(document, quick_validator()) is None


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_values_accepted_by_the_loader_pass(data: st.DataObject) -> None:
    """Hooks with any of their fields are refused only if the loader refuses them."""
    document = experiment()
    for number, (name, entry) in enumerate(data.draw(st.lists(st.sampled_from(NAMED)))):
        fields = data.draw(st.lists(st.sampled_from([*entry]), unique=True))
        document["hooks"][str(number)] = {"class_type": name, **{k: entry[k] for k in fields}}
    place = refused_at(document, quick_validator())
    if place is not None:
        with pytest.raises(ConfigError):
            load(document)


HOOKS = experiment(
    stats={"class_type": "StatsMonitor"},
    log={"class_type": "MetricsLogger", "sinks": [{"class_type": "JsonLinesSink"}]},
)
GROUPS = {"class_type": "torch.optim:AdamW", "groups": {"norms": {"parameters": ["a.*"]}}}


EMBEDDING = {"class_type": "torch.nn:Embedding", "num_embeddings": 3, "embedding_dim": 2}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("trainr", {}),
        ("trust", ["my_team"]),
        ("seed", -1),
        ("seed", "text"),
        ("trainer.max_epochs", 3),
        ("trainer.max_epoch", "three"),
        ("accelerator.mixed_precision", "bf8"),
        ("data.test", {}),
        ("data.train.batch_size", [8]),
        ("data.train.dataset.sizes", 8),
        ("data.train.dataset.size", "many"),
        ("data.train.dataset.class_type", "MLP"),
        ("data.evaluation.val.batchsize", 8),
        ("model.class_type", "StatsMonitor"),
        ("model.class_type", "torch.nn:Lienar"),
        ("model.class_type", "Net"),
        ("model.hidden.0", "eight"),
        ("model", {**EMBEDDING, "_frozen": True}),
        ("model", {**EMBEDDING, "_freeze": "hard"}),
        ("batch_processor.loss.weight_", 8),
        ("batch_processor.loss.class_type", "torch.serialization:load"),
        ("optimizer.momentom", 0.9),
        ("optimizer.lr", "fast"),
        ("optimizer.params", []),
        ("optimizer.groups", {"norms": {"parameters": "norms"}}),
        ("optimizer.groups", {"norms": {"weight_decay": 0}}),
        ("optimizer.groups.norms", {"parameters": ["a.*"], "weight_deca": 0}),
        ("optimizer.groups.norms", {"parameters": ["a.*"], "lr": "fast"}),
        ("hooks.stats.grad_normal", 3),
        ("hooks.stats.grad_norm", "often"),
        ("hooks.log.every", "often"),
        ("hooks.log.every", 50),
        ("hooks.log.sinks.0.pth", "x"),
        ("hooks.log.sinks.0.path", 3),
        ("hooks.log.sinks.0.class_type", "StatsMonitor"),
        ("hooks.stats.class_type", "StatMonitor"),
        ("hooks.stats.class_type", "robo_orchard_lab.pipeline.run.durable:remove_tree"),
        ("checkpoint.kep_last", 3),
        ("checkpoint.keep_last", "all"),
        ("resume", "maybe"),
    ],
)
def test_errors_have_their_path(place: str, value: Any) -> None:
    """A misspelled name or a wrong type has an error with its path."""
    assert refused_at(HOOKS) is None
    found = refused_at(changed(HOOKS, place, value))
    parent = place.rpartition(".")[0]
    assert found is not None
    assert found == parent or found.startswith(place)  # an unknown name is an error of its parent
    with pytest.raises(ConfigError):
        load(changed(HOOKS, place, value))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("optimizer", {"class_type": "torch.optim:AdamW", "betas": [0.9, 0.99]}),
        ("optimizer", GROUPS),
        ("optimizer", {**GROUPS, "groups": {"norms": {"parameters": "norms_and_biases"}}}),
        ("optimizer", {"class_type": "my_team.optim:Lion", "anything": {}}),
        ("model", {"func": "my_team.models:net", "depth": 3}),
        ("model", {**EMBEDDING, "_freeze": True}),
        ("model", {"func": "torchvision.models.resnet:resnet18", "num_classes": 10}),
        ("lr_scheduler", {"class_type": "torch.optim.lr_scheduler:StepLR", "step_size": 3}),
        (
            "lr_scheduler",
            {
                "class_type": "torch.optim.lr_scheduler:OneCycleLR",
                "max_lr": 0.1,
                "total_steps": "auto",
            },
        ),
        ("hooks.mine", {"class_type": "my_team.hooks:Mine", "anything": 3}),
        ("hooks.mine", {"config_type": "my_team.hooks:MineConfig"}),
        ("batch_processor", {"func": "my_team.parts:forward"}),
        ("checkpoint", None),
        ("lr_scheduler", None),
        ("run_folder", None),
        ("$schema", "experiment.schema.json"),
        ("accelerator", {"cpu": "auto", "gradient_accumulation_steps": 4}),
    ],
)
def test_valid_files_pass(place: str, value: Any) -> None:
    """User classes, groups, auto counts and null pass."""
    assert refused_at(changed(HOOKS, place, value)) is None


def test_required_fields_have_no_default() -> None:
    """Required fields have no default, since editors would write the default."""
    properties = schema()["$defs"]["torch.nn:Embedding"]["properties"]
    assert "default" not in properties["num_embeddings"]
    assert properties["norm_type"]["default"] == 2.0


@pytest.mark.parametrize("missing", ["model", "data", "batch_processor", "trainer"])
def test_required_fields_must_be_present(missing: str) -> None:
    """A file without a base must have every required field."""
    document = {key: value for key, value in HOOKS.items() if key != missing}
    assert refused_at(document) == ""
    assert refused_at({**document, "base": "other.yaml"}) is None


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("data", {}),
        ("data.train", {"batch_size": 3}),
        ("hooks.stats", {"grad_norm": False}),
        ("hooks.stats", {"class_type": "FreezeHook"}),
        ("optimizer", {"lr": 0.5}),
        ("optimizer", GROUPS | {"groups": {"norms": {"lr": 3}}}),
    ],
)
def test_a_variant_may_omit_fields_of_its_base(place: str, value: Any) -> None:
    """Required fields may be omitted with a base only."""
    assert refused_at(changed({"base": "other.yaml"}, place, value)) is None
    assert refused_at(changed(HOOKS, place, value)) is not None


def test_null_removes_entries_of_the_base_alone() -> None:
    """Named entries may be null only in a file with a base."""
    for place in ("hooks.stats", "data.evaluation.val", "optimizer.groups.norms"):
        assert refused_at(changed({"base": "other.yaml"}, place, None)) is None
        assert refused_at(changed(HOOKS, place, None)) is not None


@pytest.mark.parametrize("base", ["../other.yaml", "a/b.yaml", "\\other.yaml", 3])
def test_base_lies_in_the_same_folder(base: Any) -> None:
    """The name of a base has no folder."""
    assert refused_at({"base": base}) == "base"


def test_named_user_classes_have_their_fields() -> None:
    """A class trusted by name has its fields in the schema; a trusted package accepts any."""
    name = f"{__name__}:Greeter"
    narrow = Draft202012Validator(experiment_schema({}, trust=[name, "my_team"]))

    def fits(**entry: Any) -> bool:
        document = {"base": "other.yaml", "hooks": {"it": entry}}
        return bool(narrow.is_valid(document))

    assert fits(class_type=name, text="hello")
    assert not fits(class_type=name, txt="hello")
    assert not fits(class_type=name, text=3)
    assert fits(class_type="my_team.hooks:Any", txt=3)
    assert not fits(class_type="other_team.hooks:Any")
    with pytest.raises(ConfigReferenceError, match="'nobody:Has'"):
        experiment_schema({}, trust=["nobody:Has"])


def test_names_of_other_releases_are_skipped() -> None:
    """Only code that the installed packages define can be named; other code of them is refused."""
    names = {"torch.optim:SGD": "torch.optim.sgd:SGD", "torch.optim:Newer": "torch.optim:Newer"}
    names["nobody:Net"] = "nobody.nets:Net"
    found = experiment_schema(names)["$defs"]["class_type.Optimizer"]
    assert found["anyOf"][0]["enum"] == ["torch.optim.sgd:SGD", "torch.optim:SGD"]
    with pytest.raises(ConfigReferenceError, match=r"in torch 2.*; install a release"):
        experiment_schema({}, trust=["torch.optim:Newer"])


class Greeter(PipelineHooks):
    """A user's hook with a text."""

    def __init__(self, text: str = "hi") -> None:
        super().__init__()
        self.text = text
