"""The command that runs episodes of a saved policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import av
import pytest

from robo_orchard_lab.cli.main import main

FILE = """
name: reach
model: {class_type: "reaching_policy:ReachPolicy", noise: 0.1}
data:
  train: {dataset: {class_type: "reaching_policy:Demonstrations"}, batch_size: 4}
batch_processor: {class_type: PolicyProcessor}
optimizer: {class_type: "torch.optim:SGD", lr: 0.01}
hooks:
  log: {class_type: MetricsLogger, every: 1 step, sinks: [{class_type: JsonLinesSink}]}
  rollouts:
    class_type: RolloutEvaluation
    environment: {class_type: Reach, limit: 20, render_mode: rgb_array}
    every: 1 step
    episodes: 6
    environments: 3
    videos: 0
  best:
    class_type: KeepBest
    monitor: eval/pc_success
    mode: max
    path: pretrained_model/model.safetensors
trainer: {max_step: 1}
"""
TRUST = ["--trust", "reaching_policy"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run folder of a short training."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "reach.yaml").write_text(FILE)
    run = folder / "run"
    assert main(["train", str(folder / "reach.yaml"), "--run_folder", str(run), *TRUST]) == 0
    return run


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rolled_out(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["rollout", *map(str, arguments), "--json", *TRUST]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_result_is_that_of_the_training(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kept weights get the success rate that the run has published for them."""
    line = (trained / "metrics.jsonl").read_text().splitlines()[-1]
    published = json.loads(line)["metrics"]
    found = rolled_out(capsys, trained)
    for name in ("pc_success", "pc_success_low", "pc_success_high", "episode_length"):
        assert found[name] == published[f"eval/{name}"]
    assert [each["seed"] for each in found["episodes"]] == [*range(6)]


def test_a_run_without_a_saved_policy_uses_its_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest checkpoint of the run has the same weights here, and the same episodes."""
    expected = rolled_out(capsys, trained)
    shutil.copytree(trained, tmp_path / "copy", symlinks=True)
    shutil.rmtree(tmp_path / "copy" / "pretrained_model")
    assert rolled_out(capsys, tmp_path / "copy") == expected


def test_a_saved_policy_alone_needs_the_environment(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copied folder runs with --environment, writes a video, and prints a table."""
    policy = shutil.copytree(trained / "pretrained_model", tmp_path / "policy")
    environment = '{"func": "reaching:make_reach", "limit": 5, "render": true}'
    given = ["--environment", environment, "--trust", "reaching", *TRUST]
    capsys.readouterr()
    code = main(["rollout", str(policy), *given, "--episodes", "5", "--video", "out/all.mp4"])
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    lines = printed.out.splitlines()
    assert lines[0].split() == ["SEED", "RESULT", "STEPS", "ERROR"]
    steps = [int(line.split()[2]) for line in lines[1:6]]
    assert lines[6].startswith("success ")
    assert lines[7] == "video: out/all.mp4"
    with av.open("out/all.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == sum(steps) + 5
    assert main(["rollout", str(policy)]) == 2
    assert "pass --environment MODULE:FUNCTION" in capsys.readouterr().err


ERRORS: dict[str, tuple[list[str], int, str]] = {
    "no path": (["nowhere"], 2, "there is no nowhere"),
    "no policy": (
        [".", "--environment", "reaching:make_reach"],
        2,
        "expected a folder with config",
    ),
    "suffix": (["{run}", "--video", "a.gif"], 2, "expected --video FILE.mp4, found a.gif"),
    "untrusted": (
        ["{run}", "--environment", "os:getcwd"],
        2,
        "'os:getcwd' lies outside the trusted packages",
    ),
    "no renderer": (
        ["{run}", "--environment", "reaching:make_reach", "--video", "a.mp4"],
        1,
        "expected the render_mode 'rgb_array', found None",
    ),
    "other actions": (
        ["{run}", "--environment", '{"func": "reaching:make_three"}'],
        1,
        "the policy does not fit the environment",
    ),
    "missing package": (
        ["{run}", "--environment", "reaching:make_without_package"],
        1,
        "pip install 'robo-orchard-hooks[metaworld]'",
    ),
}


@pytest.mark.parametrize(("arguments", "code", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_input_is_one_line(
    trained: Path,
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The message has the problem, and no traceback."""
    given = [argument.replace("{run}", str(trained)) for argument in arguments]
    capsys.readouterr()
    assert main(["rollout", *given, *TRUST, "--trust", "reaching"]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
