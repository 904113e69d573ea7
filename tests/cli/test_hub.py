"""Commands ``hub push`` and ``hub pull``, against a stand-in for the Hub."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save
from tests.cli.running import START, environment
from tests.cli.spirals import EXPERIMENT

from hub_stand_in import OWNER, READER, HubStandIn, hub_stand_in
from robo_orchard_lab.cli.main import main

# Of huggingface_hub, which passes an open file as data.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SECRET = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5"
FILES = {
    "README.md",
    "config.yaml",
    "metrics.jsonl",
    "model.safetensors",
    "report.html",
    "run_state.json",
    "starts/0001.json",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory with two runs: spirals, and one with an exported model and an EMA."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "spirals.yaml").write_text(EXPERIMENT)
    hooks = (
        "hooks:\n  ema: {class_type: EMA, decay: 0.5}\n"
        "  validation: {class_type: ValidationHook, weights: {raw: null, average: ema}}\n"
        "  save: {class_type: SaveModel, folder: mine, weights: ema,\n"
        "         card: {license: mit, tags: [toy]}}\n"
    )
    (folder / "average.yaml").write_text(f"base: spirals.yaml\nname: average\n{hooks}")
    with chdir(folder):
        for name in ("spirals", "average"):
            assert main(["train", f"{name}.yaml"]) == 0
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    """Stand-in that commands in this process and in others use, with the owner's token."""
    with hub_stand_in() as started:
        variables = {
            "HF_ENDPOINT": started.address,
            "HF_TOKEN": OWNER,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        # Read when the package was imported.
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield started


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the working directory, which is the current one."""
    shutil.copytree(trained, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Return the JSON that a command prints."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def card_of(hub: HubStandIn, repo: str, revision: str = "main") -> Any:
    """Return the metadata of a repository's card."""
    return ModelCard(hub.files(repo, revision)["README.md"].decode()).data


def test_a_pushed_and_pulled_run_evaluates_to_the_same_numbers(
    hub: HubStandIn, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pulled run has the model, the experiment and metrics, and the same losses."""
    expected = printed(capsys, "evaluate", "runs/spirals")["metrics"]
    pushed = printed(capsys, "hub", "push", "runs/spirals", "--repo", "me/spirals")
    assert pushed["files"].keys() == FILES
    assert hub.files("me/spirals").keys() == FILES | {".gitattributes"}
    assert hub.repos["me/spirals"].messages[-1] == "Push the run spirals at step 30"
    pulled = printed(capsys, "hub", "pull", "me/spirals", "theirs/first")
    assert pulled["commit"] == pushed["commit"]
    assert pulled["is_run"]
    assert (Path("theirs/first") / "report.html").is_file()
    assert {*os.listdir("theirs")} == {"first"}
    assert not [*Path("theirs/first").glob(".*")]
    assert printed(capsys, "evaluate", "theirs/first")["metrics"] == expected
    [run_] = printed(capsys, "runs", "theirs")
    assert (run_["state"], run_["steps"]) == ("completed", 30)


@pytest.mark.parametrize("is_exported", [True, False])
def test_weights_of_hooks_are_evaluated_from_the_checkpoint(
    is_exported: bool, hub: HubStandIn, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that evaluates an EMA is pushed with its newest checkpoint, and gives equal numbers."""
    expected = printed(capsys, "evaluate", "runs/average")["metrics"]
    assert len(expected) == 2
    if not is_exported:  # the model is exported from the checkpoint
        shutil.rmtree("runs/average/mine")
    pushed = printed(capsys, "hub", "push", "runs/average", "--repo", "me/average")
    names = {name.rpartition("/")[0] for name in pushed["files"]}
    assert names == {"", "starts", "checkpoints/step_00000030"}
    card = card_of(hub, "me/average")
    assert (card.license, card.tags) == ("mit", ["robo-orchard-hooks", "toy"])
    printed(capsys, "hub", "pull", "me/average", "theirs")
    assert printed(capsys, "evaluate", "theirs")["metrics"] == expected


def test_all_checkpoints_resume(
    hub: HubStandIn, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run pulled with its checkpoints continues, and ends with the weights of the first one."""
    pushed = printed(capsys, "hub", "push", "runs/spirals", "--repo", "me/all", "--checkpoints")
    steps = {name.split("/")[1] for name in pushed["files"] if name.startswith("checkpoints/")}
    assert steps == {"step_00000010", "step_00000020", "step_00000030"}
    printed(capsys, "hub", "pull", "me/all", "theirs")
    for folder in ("runs/spirals", "theirs"):
        assert main(["train", f"{folder}/config.yaml", "--trainer.max_epoch", "4"]) == 0
    ends = [
        load_file(f"{f}/checkpoints/last/model.safetensors") for f in ("theirs", "runs/spirals")
    ]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_nothing_private_is_pushed(
    hub: HubStandIn, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No host, no folder, no log, no diff, and nothing behind a link leaves the machine."""
    folder = Path("runs/average")
    outside = work / "outside.txt"
    outside.write_text("private text")
    (folder / "mine" / "notes.txt").symlink_to(outside)
    (folder / "mine" / "code.py").write_text("private_code = 1")
    (folder / "train.log").write_text("private log")
    start = json.loads((folder / "starts" / "0001.json").read_text())
    start["command"] = f"/home/anna/bin/robo-orchard-lab train a.yaml --hub_token {SECRET}"
    start["git"] = {"commit": "c" * 40, "changed": [" M private_file.py"], "diff": None}
    (folder / "starts" / "0001.json").write_text(json.dumps(start))
    (folder / "starts" / "0001.diff").write_text("private diff")
    found = printed(capsys, "hub", "push", "runs/average", "--repo", "me/a", "--dry-run")
    assert hub.requests == []
    assert len(found["notes"]) == 3
    assert main(["hub", "push", "runs/average", "--repo", "me/a"]) == 0
    err = capsys.readouterr().err
    assert "notes.txt is not pushed: it is a link" in err
    assert "code.py is not pushed: expected .json" in err
    everything = hub.files("me/a")
    assert {*everything} - {".gitattributes"} == {*found["files"]}
    for name, data in everything.items():
        texts = [b"private", SECRET.encode(), b"/home/anna"]
        if not name.startswith("checkpoints/"):  # a checkpoint is shared as it is
            texts += [socket.gethostname().encode(), str(work).encode()]
        for text in texts:
            assert text not in data, (name, text)
    record = json.loads(everything["starts/0001.json"])
    assert record["command"] == "robo-orchard-lab train a.yaml --hub_token (removed)"
    assert record["git"]["commit"] == "c" * 40


def test_a_secret_in_a_file_is_refused(
    hub: HubStandIn, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A token in the experiment file stops the push before the first request."""
    config = Path("runs/spirals/config.yaml")
    config.write_text(config.read_text() + f"# {SECRET}\n")
    assert main(["hub", "push", "runs/spirals", "--repo", "me/spirals"]) == 2
    err = capsys.readouterr().err
    lines = len(config.read_text().splitlines())
    assert f"config.yaml:{lines}: found a token, a password" in err
    assert SECRET not in err
    assert hub.requests == []


def test_options_of_a_push(hub: HubStandIn, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Private repository, branch, license and tags; a second push of the run adds no commit."""
    command = ["hub", "push", "runs/spirals", "--repo", "me/s", "--private", "--revision", "v1"]
    first = printed(capsys, *command, "--license", "apache-2.0", "--tag", "a", "--name", "Best")
    repo = hub.repos["me/s"]
    assert repo.private
    assert repo.commits[repo.branches["main"]].keys() == {".gitattributes"}
    card = card_of(hub, "me/s", "v1")
    assert (card.license, card.tags) == ("apache-2.0", ["robo-orchard-hooks", "a"])
    assert card.model_name == "Best"
    assert card.eval_results[0].metric_type == "loss"
    sent = len(hub.puts)
    second = printed(capsys, *command, "--license", "apache-2.0", "--tag", "a", "--name", "Best")
    assert len(hub.puts) == sent
    assert second == first
    assert main(["hub", "pull", "me/s", "there", "--revision", "v1"]) == 0
    assert main(["hub", "pull", "me/s", "again", "--revision", first["commit"]]) == 0
    assert "pulled 6 files" in capsys.readouterr().out
    assert (
        Path("again/model.safetensors").read_bytes() == hub.files("me/s", "v1")["model.safetensors"]
    )


def test_stale_weights_are_removed(
    hub: HubStandIn, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A later push removes shards and checkpoints of an earlier one; other files stay."""
    stale = ["model-00001-of-00002.safetensors", "checkpoints/step_00000001/manifest.json"]
    hub.add("me/s", {**dict.fromkeys(stale, b"old"), "notes.md": b"mine"})
    printed(capsys, "hub", "push", "runs/spirals", "--repo", "me/s")
    assert hub.files("me/s").keys() == FILES | {"notes.md"}


ERRORS: dict[str, tuple[list[str], str | None, str]] = {
    "no login": (["push", "runs/spirals", "--repo", "me/a"], None, "hf auth login"),
    "no right": (["push", "runs/spirals", "--repo", "you/a"], OWNER, "token with write access"),
    "read token": (["push", "runs/spirals", "--repo", "me/a"], READER, "token with write access"),
    "no name": (["push", "runs/spirals", "--repo", "a b"], OWNER, "expected owner/name"),
    "no repo": (["pull", "me/none"], OWNER, "there is no repository me/none, or it is private"),
    "private": (["pull", "me/private"], None, "for a private repository, log in"),
    "no revision": (["pull", "me/public", "--revision", "v9"], OWNER, "has no revision 'v9'"),
    "no data": (["pull", "me/code"], OWNER, "has no files to pull: expected .json"),
    "bad name": (["pull", "me/bad"], OWNER, "whose name contains '..'; nothing was pulled"),
    "exists": (["pull", "me/public", "runs/spirals"], OWNER, "hub pull me/public FOLDER"),
}


@pytest.mark.parametrize(("arguments", "token", "said"), ERRORS.values(), ids=ERRORS)
def test_errors_have_a_remedy(
    hub: HubStandIn,
    work: Path,
    arguments: list[str],
    token: str | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An error is two lines: the problem, and what to do; nothing is left behind."""
    hub.add("me/private", {"config.json": b"{}"}, private=True)
    hub.add("me/public", {"config.json": b"{}"})
    hub.add("me/code", {"setup.py": b"", "pytorch_model.bin": b"", ".hidden.json": b"{}"})
    hub.add("me/bad", {"../../config.json": b"{}"})
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    before = sorted(os.listdir("runs"))
    assert main(["hub", *arguments]) in (1, 2)
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("error: ")
    assert len(err.splitlines()) <= 2
    assert sorted(os.listdir("runs")) == before


def test_another_push_is_a_conflict(
    hub: HubStandIn, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A commit between listing and commit is an error; the second attempt sends no data again."""
    hub.add("me/s", {})
    hub.race = "me/s"
    command = ["hub", "push", "runs/spirals", "--repo", "me/s"]
    assert main(command) == 1
    assert "changed by another push at the same time" in capsys.readouterr().err
    sent = len(hub.puts)
    assert main(command) == 0
    assert len(hub.puts) == sent
    assert hub.files("me/s").keys() == FILES | {"other.md"}


def test_no_network_is_an_error(
    hub: HubStandIn,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The error names the address, without a traceback."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for command in (["push", "runs/spirals", "--repo", "me/s"], ["pull", "me/s"]):
        assert main(["hub", *command]) == 1
        assert "http://127.0.0.1:9 can't be reached" in capsys.readouterr().err


def killed_while_held(
    hub: HubStandIn, *arguments: str, until: Callable[[], bool] = lambda: True
) -> None:
    """Start a command, and kill it when the stand-in holds its transfer and ``until`` is true."""
    started = subprocess.Popen([*START, *arguments], env=environment())
    try:
        assert hub.held.wait(600), started.poll()
        while not until():
            time.sleep(0.02)
    finally:
        started.kill()
        started.wait()
    hub.release.set()


def test_a_killed_pull_continues(
    hub: HubStandIn, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second pull requests only the files that are missing; until then there is no folder."""
    weights = save({"w": torch.arange(100_000, dtype=torch.int32)})
    hub.add("me/large", {"model.safetensors": weights, "config.json": b"{}"})
    hub.hold_get["model.safetensors"] = 1 << 17
    killed_while_held(
        *(hub, "hub", "pull", "me/large"),
        until=lambda: any(Path("runs").glob(".large.*.partial/config.json")),
    )
    assert not Path("runs/large").exists()
    hub.requests.clear()
    printed(capsys, "hub", "pull", "me/large")
    assert (Path("runs/large") / "model.safetensors").read_bytes() == weights
    files = {path.rpartition("/")[2] for method, path, _ in hub.requests if "/resolve/" in path}
    assert files == {"model.safetensors"}
    assert not [*Path("runs").glob(".large*")]


def test_a_cut_connection_continues(
    hub: HubStandIn, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest of a large file is requested, not the file again."""
    weights = save({"w": torch.arange(5_000_000, dtype=torch.int32)})
    hub.add("me/large", {"model.safetensors": weights})
    hub.cut_get["model.safetensors"] = 15 << 20  # the client writes blocks of 10 MiB
    printed(capsys, "hub", "pull", "me/large")
    assert (Path("runs/large") / "model.safetensors").read_bytes() == weights
    ranges = [asked for method, path, asked in hub.requests if asked is not None]
    assert ranges == [f"bytes={10 << 20}-"]


def test_a_killed_push_continues(
    hub: HubStandIn, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second push does not send again what the Hub has; until then there is no commit."""
    hub.hold_put = 1
    command = ["hub", "push", "runs/spirals", "--repo", "me/s", "--checkpoints"]
    killed_while_held(hub, *command)
    assert hub.files("me/s").keys() == {".gitattributes"}
    had = {*hub.blobs}
    hub.hold_put = None
    hub.puts.clear()
    printed(capsys, *command)
    assert had
    assert not had & {*hub.puts}
    assert "checkpoints/step_00000030/manifest.json" in hub.files("me/s")


def test_a_pulled_run_is_a_strangers(
    hub: HubStandIn, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code in a repository is not pulled, and code that its file names is not imported."""
    printed(capsys, "hub", "push", "runs/spirals", "--repo", "me/s")
    files = dict(hub.files("me/s"))
    files["config.yaml"] = files["config.yaml"].replace(
        b"robo_orchard_lab.experiment.samples:MLP", b"evil.models:Net"
    )
    files |= {"evil/models.py": b"open('ran', 'w')", "pyproject.toml": b"", "model.bin": b"x"}
    files["report.html"] = b"<script>evil()</script>"
    hub.repos["me/s"].commit("main", files, "changed")
    pulled = printed(capsys, "hub", "pull", "me/s", "theirs")
    assert pulled["files"].keys() == FILES - {"report.html"}
    assert "evil()" not in Path("theirs/report.html").read_text()
    assert not Path("theirs/evil").exists()
    assert main(["evaluate", "theirs"]) == 2
    assert "evil" in capsys.readouterr().err
    assert not Path("ran").exists()


def test_a_changed_file_is_refused(
    hub: HubStandIn, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file with another digest than the Hub names is removed, and pulled again next time."""
    weights = save({"w": torch.ones(100)})
    hub.add("me/w", {"model.safetensors": weights})
    hub.damaged["model.safetensors"] = weights[:-1] + b"\x01"
    assert main(["hub", "pull", "me/w"]) == 1
    assert "model.safetensors differs from the file of the Hub" in capsys.readouterr().err
    assert not Path("runs/w").exists()
    hub.damaged.clear()
    assert main(["hub", "pull", "me/w"]) == 0
    assert Path("runs/w/model.safetensors").read_bytes() == weights
