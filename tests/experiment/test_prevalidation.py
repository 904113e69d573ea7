"""Prevalidation refuses a document before the first import."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from robo_orchard_core.utils.config import ConfigError, Trust, TrustError
from robo_orchard_core.utils.config.formats import Plain
from robo_orchard_lab.experiment import ExperimentConfig
from robo_orchard_lab.experiment.catalogue import ExperimentTrust
from robo_orchard_lab.experiment.document import ExperimentDocument, read_experiment
from robo_orchard_lab.experiment.overrides import from_arguments, from_mapping
from robo_orchard_lab.experiment.prevalidation import RENAMED_FIELDS, prevalidate

TRUST = ExperimentTrust(("my_parts",)).trust
PLAIN = """\
model: {class_type: MLP, features: [2, 16, 2]}
data:
  train:
    dataset: {class_type: Spirals}
    collate_fn: my_parts:collate
batch_processor: {class_type: SupervisedProcessor, loss: {class_type: torch.nn:CrossEntropyLoss}}
optimizer: {class_type: torch.optim:SGD, lr: 0.1}
hooks:
  log: {class_type: MetricsLogger, every: 5 steps}
trainer: {max_epoch: 1}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str = "", *options: str, **changes: Any) -> ExperimentDocument:
    """Return the plain document with more lines, command line options and values from code."""
    Path("a.yaml").write_text(PLAIN + text)
    overrides = from_arguments(options)[0] + from_mapping(changes)
    return read_experiment("a.yaml", overrides=overrides)


def refused(document: ExperimentDocument, trust: Trust = TRUST) -> ConfigError:
    """Return the error of prevalidating the document."""
    with pytest.raises(ConfigError) as caught:
        prevalidate(document, trust)
    return caught.value


def test_an_experiment_passes() -> None:
    """A document with names of the catalogue and of trusted packages passes."""
    prevalidate(read(), TRUST)
    error = refused(read(), ExperimentTrust().trust)
    assert isinstance(error, TrustError)
    assert str(error) == (
        "a.yaml:5: data.train.collate_fn: 'my_parts:collate' is not trusted; "
        "if you trust its code, pass --trust my_parts"
    )


@pytest.mark.parametrize("field", [*ExperimentConfig.model_fields])
def test_every_field_that_holds_a_mapping_refuses_a_number(field: str) -> None:
    """Only scalar fields accept a number, and only nullable fields accept null."""
    scalars = {"name", "seed", "run_folder", "resume"}
    nullable = {"model", "batch_processor", "optimizer", "lr_scheduler", "checkpoint"}
    nullable |= {"init_from", "compile"}
    others = {
        "compile": "a mapping, true or false",
        "gradient_checkpointing": "a list, true or false",
    }
    expected = f"expected {others.get(field, 'a mapping')}, found"
    if field in scalars:
        prevalidate(read("", f"--{field}=3"), TRUST)
    else:
        assert f"{expected} 3 (int)" in str(refused(read("", f"--{field}=3")))
    if field in nullable | scalars:
        prevalidate(read("", f"--{field}=null"), TRUST)
    else:
        assert f"{expected} None" in str(refused(read("", f"--{field}=null")))


@pytest.mark.parametrize(("path", "new_name"), RENAMED_FIELDS.items())
def test_former_field_name_is_refused_with_the_current_name(
    path: tuple[str, ...], new_name: str
) -> None:
    """A renamed field has an error with the current name, from a file and from code."""
    option = ".".join(path)
    problem = f"{option}: this field was renamed; write {new_name} instead"
    assert str(refused(read("", f"--{option}=x"))) == f"command line: --{option}: {problem}"
    with pytest.raises(ConfigError, match=re.escape(problem)):
        ExperimentConfig.from_dict({path[0]: {path[-1]: "x"} if path[1:] else "x"})


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("--modl={}", "modl: an experiment has no such field; did you mean 'model'?"),
        ("--trust=[os]", "trust: a file can't grant trust; pass --trust"),
        ("--data=null", "data: expected a mapping, found None (NoneType)"),
        ("--data=3", "data: expected a mapping, found 3 (int)"),
        ("--hooks=[]", "hooks: expected a mapping, found [] (list)"),
        (
            "--hooks.lgo.every=3 steps",
            "hooks.lgo: there is no entry of this name; did you mean 'log'?",
        ),
        ("--hooks.x=3", "hooks.x: expected a mapping, found 3 (int)"),
        ("--data.evaluation=[]", "data.evaluation: expected a mapping of names, found [] (list)"),
        ("--optimizer.groups.a=1", "optimizer.groups.a: expected a mapping, found 1 (int)"),
        ("--model.class_type=3", "expected a name like 'package.module:Name', found 3 (int)"),
        ("--model.class_type=MPL", "expected a reference like 'package.module:ClassName', found"),
        ("--hooks.log.class_type=StatMonitor", "did you mean 'StatsMonitor'?"),
        ("--optimizer.class_type=torch.optim:SDG", "did you mean 'torch.optim:SGD'?"),
        ("--model.class_type=os:system", "model.class_type: 'os:system' is not trusted"),
        ("--model.class_type=my_parts.__main__:x", "can't be named in a document"),
        ("--model.class_type=my_parts:f.__globals__", "can't be named in a document"),
        (
            f"--model.class_type=my_parts:{'x' * 300}",
            "expected a name of at most 300 characters, found 309",
        ),
        (
            "--data.train.dataset.x=[{a: {func: 'my:f'}}]",
            "data.train.dataset.x.0.a.func: 'my:f' is",
        ),
    ],
)
def test_invalid_values_are_refused_with_their_path(option: str, problem: str) -> None:
    """The one-line error has the option, the path and the remedy."""
    error = str(refused(read("", option)))
    assert error.startswith(f"command line: {option.partition('=')[0]}")
    assert problem in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("there", "option", "near"),
    [
        ("--data.evaluation.val.dataset={}", "--data.evaluation.vall.batch_size=3", "val"),
        ("--optimizer.groups.norms.parameters=[]", "--optimizer.groups.norm.lr=3", "norms"),
    ],
)
def test_misspelled_entry_name_has_a_suggestion(there: str, option: str, near: str) -> None:
    """A field of a misspelled entry name gives a suggestion."""
    prevalidate(read("", there), TRUST)
    assert f"there is no entry of this name; did you mean {near!r}?" in str(
        refused(read("", there, option))
    )


@pytest.mark.parametrize("name", ["model", "data", "batch_processor", "trainer"])
def test_required_fields_must_be_present(name: str) -> None:
    """A missing required field is named."""
    text = re.sub(rf"(?m)^{name}:.*\n( .*\n)*", "", PLAIN)
    Path("a.yaml").write_text(text)
    error = refused(read_experiment("a.yaml"))
    assert str(error) == f"a.yaml: {name}: a value is required here and none is given"


OUTSIDE = ["/tmp/x", "..", "../x", "a/../../x", ".", "", "a\0b", "a\nb", "\\x", "c:\\x", "a\\..\\x"]


@pytest.mark.parametrize("folder_name", OUTSIDE)
@pytest.mark.parametrize("field", ["run_folder", "name"])
def test_run_folder_of_a_file_lies_below_the_current_folder(field: str, folder_name: str) -> None:
    """A run folder derived from the name has the same restrictions."""
    if field == "name" and folder_name in (".", ""):
        return  # runs itself
    quoted = folder_name.encode("unicode_escape").decode()
    error = refused(read(f'{field}: "{quoted}"\n'))
    assert str(error).startswith(f"a.yaml:11: {field}: a file's run folder must lie below")
    if folder_name != "a\0b":
        prevalidate(read("", **{field: folder_name}), TRUST)  # code may use any folder


def test_run_folder_of_a_file_is_not_behind_a_link(folder: Path) -> None:
    """A run folder behind a link is refused, since the file's author may have made the link."""
    (folder / "outside").mkdir()
    (folder / "runs").symlink_to(folder / "outside")
    (folder / "mine").mkdir()
    prevalidate(read("run_folder: mine/new/run\n"), TRUST)
    for text in ("run_folder: runs\n", "run_folder: runs/a/b\n", "name: a\n"):
        assert "behind the link 'runs'" in str(refused(read(text)))
    prevalidate(read("", "--run_folder=runs/a"), TRUST)
    prevalidate(read("name: a\n", "--run_folder=runs/a"), TRUST)


def test_run_folder_of_a_file_has_no_other_files(folder: Path) -> None:
    """A folder with other files is refused, except for hidden files of a job script."""
    run = folder / "runs/a"
    run.mkdir(parents=True)
    (run / ".began").touch()
    prevalidate(read("name: a\n"), TRUST)
    (run / "config.yaml").touch()
    assert "the folder 'runs/a' holds other files and no run" in str(refused(read("name: a\n")))
    prevalidate(read("name: a\n", "--run_folder=runs/a"), TRUST)
    (run / "starts").mkdir()
    prevalidate(read("name: a\n"), TRUST)


def test_links_inside_a_run_must_not_lead_out(folder: Path) -> None:
    """A link out of the run folder is refused; the link to the last checkpoint is allowed."""
    run = folder / "runs/a"
    (run / "checkpoints/step_1").mkdir(parents=True)
    (run / "starts").mkdir()
    (run / "checkpoints/last").symlink_to("step_1")
    prevalidate(read("name: a\n"), TRUST)
    (run / "metrics.jsonl").symlink_to(folder / "mine.txt")
    assert "the link 'runs/a/metrics.jsonl' leads out of the run folder" in str(
        refused(read("name: a\n"))
    )
    prevalidate(read("name: a\n", "--run_folder=runs/a"), TRUST)


@pytest.mark.parametrize(
    "cls", ["TrackerSink", "robo_orchard_lab.pipeline.sinks:TrackerSinkConfig"]
)
def test_remote_trackers_require_trust(cls: str) -> None:
    """TensorBoard needs no trust, while remote trackers do."""
    key = "config_type" if cls.endswith("Config") else "class_type"
    text = f"  out: {{class_type: MetricsLogger, sinks: [{{{key}: '{cls}', trackers: [%s]}}]}}\n"

    def document(trackers: str) -> ExperimentDocument:
        Path("a.yaml").write_text(PLAIN.replace("trainer:", text % trackers + "trainer:"))
        return read_experiment("a.yaml")

    prevalidate(document("tensorboard"), TRUST)
    error = refused(document("tensorboard, wandb"))
    assert isinstance(error, TrustError)
    assert "hooks.out.sinks.0.trackers.1: the tracker 'wandb' (str) is not trusted" in str(error)
    prevalidate(document("tensorboard, wandb"), ExperimentTrust(("my_parts", "wandb")).trust)


def test_overrides_are_bounded_as_well() -> None:
    """Overrides are limited in depth, number of values and key length."""
    deep: Plain = 0
    for _ in range(60):
        deep = [deep]
    with pytest.raises(ConfigError, match="deeper than 64 levels"):
        read("", **{"model.a.b.c.d.e": deep})
    assert "more than 20000 values" in str(refused(read("", model={"a": [0] * 20_000})))
    assert "keys of at most 200" in str(refused(read("", model={"k" * 201: 0})))
