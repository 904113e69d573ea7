"""Tests of the commands ``config init|check|show|diff``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tests.cli.running import run, run_in_terminal, run_module

from robo_orchard_lab.cli.experiment_arguments import ExperimentArguments
from robo_orchard_lab.cli.main import main
from robo_orchard_lab.cli.output import readable_yaml
from robo_orchard_lab.pipeline.sinks import read_metrics


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a starting file in the current folder."""
    monkeypatch.chdir(tmp_path)
    assert main(["config", "init"]) == 0
    return "experiment.yaml"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_init_writes_a_valid_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file passes `config check` without trust, and the output names the next command."""
    done = run("config", "init", "first.yaml", cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out == "wrote first.yaml; to train it: robo-orchard-lab train first.yaml\n"
    text = (tmp_path / "first.yaml").read_text()
    assert "experiment.yaml" not in text
    assert text.count("#") > 15
    monkeypatch.chdir(tmp_path)
    assert shown(capsys, "config", "check", "first.yaml") == "first.yaml: ok\n"


def test_init_keeps_an_existing_file(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """init replaces no file, and writes YAML only."""
    Path(file).write_text("mine")
    capsys.readouterr()
    assert main(["config", "init"]) == 2
    assert "experiment.yaml already exists" in capsys.readouterr().err
    assert Path(file).read_text() == "mine"
    assert main(["config", "init", "x.toml"]) == 2
    assert "name it x.yaml" in capsys.readouterr().err
    assert main(["config", "init", "not/there/x.yaml"]) == 2
    assert "can't be written: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("format_", ["yaml", "toml", "json"])
def test_show_prints_a_complete_file_in_each_format(
    file: str, format_: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The output, overrides included, is a file of the same experiment."""
    text = shown(capsys, "config", "show", file, "--trainer.max_epoch", "3", "--format", format_)
    (tmp_path / f"all.{format_}").write_text(text)
    same = ExperimentArguments().load(tmp_path / f"all.{format_}")
    assert same == ExperimentArguments().load(Path(file)).replace(**{"trainer.max_epoch": 3})


def test_yaml_is_shown_with_few_quotes(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Quotes appear only where some YAML version requires them."""
    text = shown(capsys, "config", "show", file)
    assert "    class_type: robo_orchard_lab.experiment.samples:Spirals\n" in text
    assert "    every: 50 steps | 1 epoch\n" in text
    assert '  mixed_precision: "no"\n' in text


def test_quotes_stay_where_they_are_needed() -> None:
    """Text that would mean something else without quotes keeps them."""
    texts = ["12:30", "a: b", "a #b", "- x", "", "x ", "a\nb", "é", "NULL", "x:", "1e3", "*", "1 2"]
    document = {"texts": [*texts, "x y", "m:N", "fc.*", "3 epochs"], "on": {"y": "on"}}
    written = readable_yaml(document)  # type: ignore[arg-type]  # lists aren't covariant
    assert yaml.safe_load(written) == document
    assert [line for line in written.splitlines() if '"' not in line] == [
        "texts:", "- x y", "- m:N", "- fc.*", "- 3 epochs"
    ]  # fmt: skip


def test_each_value_is_shown_with_its_origin(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--origins names file and line, base, environment, option or default of each value."""
    Path("mine.yaml").write_text(f"base: {file}\nname: mine\nhooks:\n  stats: null\n")
    typed = ("--hooks.log.every", "10 steps", "--trainer.max_epoch=2")
    monkeypatch.setenv("ROBO_ORCHARD_LAB__SEED", "7")
    out = shown(capsys, "config", "show", "mine.yaml", "--origins", *typed)
    rows = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in out.splitlines()}
    assert rows["FIELD"] == "FROM"
    assert rows["name"] == "mine.yaml:2"
    assert rows["resume"].startswith("experiment.yaml:")
    assert rows["seed"] == "environment: ROBO_ORCHARD_LAB__SEED"
    assert rows["hooks.log.every"] == "command line: --hooks.log.every"
    assert rows["trainer.max_epoch"] == "command line: --trainer.max_epoch"
    assert rows["trainer.max_step"] == "default"
    assert rows["model.hidden"].startswith("experiment.yaml:")
    assert rows["hooks.validation.every"].startswith("experiment.yaml:")
    assert rows["hooks.bar.plain"] == "default"
    assert not any(field.startswith("hooks.stats") for field in rows)


def test_origins_are_printed_as_json(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each value has field, value, layer and location."""
    printed = json.loads(
        shown(capsys, "config", "show", file, "--origins", "--json", "--seed", "3")
    )
    seed = next(each for each in printed if each["field"] == "seed")
    assert seed == {"field": "seed", "value": 3, "layer": "command line", "from": "--seed"}
    whole = json.loads(shown(capsys, "config", "show", file, "--json", "--seed", "3"))
    assert whole["seed"] == 3


def test_origins_and_format_exclude_each_other(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table is not TOML."""
    assert main(["config", "show", file, "--origins", "--format", "toml"]) == 2
    assert "--origins is a table" in capsys.readouterr().err


def test_check_prints_all_errors(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every error of every file has its line and field, and the exit code is 2."""
    text = Path(file).read_text()
    Path("wrong.yaml").write_text(
        text.replace("max_epoch: 20", "max_epoch: many").replace("shuffle: true", "shuffle: 3")
    )
    Path("broken.yaml").write_text("name: [")
    capsys.readouterr()
    assert main(["config", "check", file, "wrong.yaml", "broken.yaml", "gone.yaml"]) == 2
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "experiment.yaml: ok"
    assert any(line.startswith("error: wrong.yaml:29: data.train.shuffle: ") for line in out)
    assert any(line.startswith("error: wrong.yaml:68: trainer.max_epoch: ") for line in out)
    assert any(line.startswith("error: broken.yaml") and "broken YAML" in line for line in out)
    assert out[-1] == "gone.yaml: error: there is no file gone.yaml"
    assert main(["config", "check", file, "wrong.yaml", "--json"]) == 2
    printed = json.loads(capsys.readouterr().out)
    assert [each["ok"] for each in printed] == [True, False]
    assert {each["field"] for each in printed[1]["errors"]} >= {"data.train.shuffle"}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--trainer.max_epochs", "3"], "--trainer.max_epochs: TrainerConfig has no such field"),
        (["--hooks.bar.class_type", "ProgresBarHook"], "did you mean 'ProgressBarHook'"),
        (["--hooks.bar.class_type", "os:system"], "os:system"),
        (["--seed", "many"], "error: --seed: "),
        (["--run_folder", "runs/x", "--resume", "maybe"], "error: --resume: "),
    ],
)
def test_an_invalid_option_is_named_in_the_error(
    file: str, typed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error has one or two lines, with the option and the nearest name."""
    capsys.readouterr()
    assert main(["config", "show", file, *typed]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert len(printed.err.splitlines()) <= 2


def test_diff_shows_the_effect_on_a_resume(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each difference says whether a run can resume with it."""
    Path("variant.yaml").write_text("base: experiment.yaml\nname: other\nhooks: {bar: null}\n")
    assert shown(capsys, "config", "diff", file, file) == "no difference\n"
    text = shown(capsys, "config", "diff", file, "variant.yaml", "--seed", "4")
    rows = [line.split() for line in text.splitlines()]
    assert rows[0] == ["FIELD", "BEFORE", "AFTER", "RESUME", "BECAUSE"]
    assert rows[1][:4] == ["seed", "0", "4", "impossible"]
    assert ["name", "spirals", "other", "harmless"] in rows
    assert "ProgressBarHook ..." in text
    printed = json.loads(shown(capsys, "config", "diff", file, "variant.yaml", "--json"))
    assert {each["field"]: each["resume"] for each in printed} == {
        "name": "harmless",
        "hooks.bar": "harmless",
    }


def test_a_table_fits_the_terminal(file: str) -> None:
    """Headings are bold, and no line is wider than the terminal."""
    ended = run_in_terminal("config", "show", file, "--origins", columns=130)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0].startswith("\x1b[1mFIELD")
    assert max(map(len, lines[1:])) <= 130


def test_trusted_modules_of_the_working_directory_are_found(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program and `python -m` import a trusted module of the working directory."""
    Path("own_parts.py").write_text(
        "import pathlib, torch\n"
        "pathlib.Path('imported').touch()\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self, width: int) -> None:\n"
        "        super().__init__(2, width)\n"
    )
    Path("torch.py").write_text("raise SystemExit('a stranger')")
    Path("own.yaml").write_text(f"base: {file}\nmodel: {{class_type: own_parts:Net, width: 3}}\n")
    assert main(["config", "check", "own.yaml"]) == 2
    assert "'own_parts:Net' is not trusted; if you trust its code, pass --trust own_parts" in (
        capsys.readouterr().out
    )
    assert not Path("imported").exists()
    arguments = ("config", "check", "own.yaml")
    assert run_module(*arguments, "--trust", "own_parts", cwd=tmp_path).out == "own.yaml: ok\n"
    Path("pyproject.toml").write_text('[tool.robo_orchard_lab]\ntrust = ["own_parts"]\n')
    assert run(*arguments, cwd=tmp_path).out == "own.yaml: ok\n"


def test_the_example_file_learns(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The written file trains a model that classifies its spirals."""
    out = shown(capsys, "train", file)
    assert out.startswith("runs/spirals: completed after 600 steps\n")
    losses = read_metrics("runs/spirals/metrics.jsonl")[-1].by_step()[600]
    assert losses["eval/val/loss"] < 0.1


def test_a_file_name_that_is_too_long_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The error is that of a missing file."""
    assert main(["train", f"{'a' * 5000}.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no file aaa")


def test_check_shows_all_errors_of_a_file(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Unknown fields at the top and inside hide neither each other nor wrong values."""
    text = Path(file).read_text()
    for right, wrong in (
        ("seed: 0\n", "seed: -4\nsede: 2\n"),
        ("lr: 0.005\n  weight", "lr: fast\n  weight"),
        ("max_epoch: 20", "max_epoch: -1\n  " + "\n  ".join(f"typo_{i}: 1" for i in range(12))),
        ("resume: auto", "resume: maybe\nlr_schedule: 3"),
    ):
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    Path(file).write_text(text)
    capsys.readouterr()
    assert main(["config", "check", file, "--json"]) == 2
    [found] = json.loads(capsys.readouterr().out)
    typos = [f"trainer.typo_{i}" for i in range(12)]
    others = ["sede", "lr_schedule", "seed", "optimizer.lr", "resume", "trainer.max_epoch"]
    assert sorted(error["field"] for error in found["errors"]) == sorted([*others, *typos])


def test_check_imports_nothing_of_a_file_with_untrusted_code(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The errors that need imports are not searched for then."""
    Path("own.yaml").write_text(
        f"base: {file}\nsede: 1\nmodel: {{class_type: own:Net}}\nseed: -1\noptimizer: {{lr: x}}\n"
    )
    capsys.readouterr()
    assert main(["config", "check", "own.yaml"]) == 2
    out = capsys.readouterr().out
    assert "'own:Net' is not trusted" in out
    assert "sede: an experiment has no such field" in out
    assert "seed: Input" in out
    assert "optimizer.lr" not in out
