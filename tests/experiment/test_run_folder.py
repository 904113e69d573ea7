"""Contents of a run folder, and finding runs by path."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from robo_orchard_lab.experiment.run_folder import (
    NoRunError,
    find_escaping_link,
    find_run,
    record_start,
    run_config_file,
)
from robo_orchard_lab.pipeline.checkpoint.manifest import MANIFEST_FILE
from robo_orchard_lab.pipeline.run import run_info as git_module
from robo_orchard_lab.pipeline.run.run_info import MAX_NAMES, git_state


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=Someone", "-c", "user.email=someone@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with a commit, as current folder."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "work")
    (folder / "train.py").write_text("steps = 1\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "Begin")
    monkeypatch.chdir(folder)
    return folder


def test_start_record_suffices_to_repeat_the_run(repository: Path) -> None:
    """The record has command, versions and git state, and its diff applies to the commit."""
    (repository / "train.py").write_text("steps = 2\n")
    (repository / "new.py").write_text("")
    (repository / "sub").mkdir()
    os.chdir(repository / "sub")  # the diff covers the complete repository
    run = repository.parent / "runs" / "first"
    path = record_start(run, "seed: 0\n", processes=2, changes=({"path": "seed"},))
    record = json.loads(path.read_text())
    assert path == run / "starts" / "0001.json"
    assert record["processes"] == 2
    assert record["changes"] == [{"path": "seed"}]
    assert {"python", "torch", "accelerate"} <= record["versions"].keys()
    assert record["command"]
    assert record["git"]["commit"] == git(repository, "rev-parse", "HEAD")
    assert record["git"]["branch"] == "work"
    assert record["git"]["changed"] == [" M train.py", "?? new.py"]
    assert record["git"]["left_out"] is None
    git(repository, "checkout", "-q", "train.py")
    git(repository, "apply", str(run / "starts" / record["git"]["diff"]))
    assert (repository / "train.py").read_text() == "steps = 2\n"
    assert (run / "config.yaml").read_text() == "seed: 0\n"


def test_starts_are_numbered(repository: Path) -> None:
    """Each start has its own file, and the config is the last start's."""
    run = repository / "run"
    assert [record_start(run, f"seed: {n}\n").name for n in range(2)] == ["0001.json", "0002.json"]
    assert run_config_file(run) == run / "config.yaml"
    assert (run / "config.yaml").read_text() == "seed: 1\n"
    assert not list(run.glob("starts/*.diff"))  # nothing differs from the commit


def test_environment_variables_are_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No environment variable is recorded, since variables may hold keys."""
    monkeypatch.setenv("SOME_API_KEY", "do-not-tell")
    record_start(tmp_path / "run", "seed: 0\n")
    recorded = b"".join(
        file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()
    )
    assert b"do-not-tell" not in recorded
    assert b"SOME_API_KEY" not in recorded


def test_run_starts_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without git or a repository, the record has no git state."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert json.loads(record_start(tmp_path / "run", "").read_text())["git"] is None


def test_a_hanging_git_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hanging git is killed after its timeout, without leftover processes."""
    script = tmp_path / "git"
    script.write_text('#!/bin/sh\nsleep 60 &\necho $! > "$0.pid"\nwait\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    began_at = time.monotonic()
    assert git_state(tmp_path, timeout_s=0.5) is None
    assert time.monotonic() - began_at < 5
    left = Path("/proc") / (tmp_path / "git.pid").read_text().strip() / "cmdline"
    while left.exists() and left.read_bytes():  # an unreaped process has no command line
        assert time.monotonic() - began_at < 10
        time.sleep(0.01)


def test_large_changes_are_left_out(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A diff or a list of names above its limit is left out and noted."""
    monkeypatch.setattr(git_module, "MAX_DIFF_BYTES", 20_000)
    (repository / "train.py").write_text("x\n" * 20_000)
    for number in range(MAX_NAMES + 1):
        (repository / f"{number}.txt").write_text("")
    state = git_state(repository)
    assert state is not None
    assert state.diff is None
    assert len(state.changed) == MAX_NAMES
    assert state.left_out is not None
    assert "diff" in state.left_out
    assert "2 changed files" in state.left_out


def test_a_repository_without_a_commit_has_a_state(tmp_path: Path) -> None:
    """A repository without a commit has a state without commit and diff."""
    git(tmp_path, "init", "-q", "-b", "work")
    (tmp_path / "train.py").write_text("")
    state = git_state(tmp_path)
    assert state is not None
    assert (state.commit, state.branch, state.diff) == (None, "work", None)


def test_git_settings_run_no_programs(repository: Path) -> None:
    """Diff and monitor programs of a repository's settings are not started."""
    (repository / "tool").write_text(f"#!/bin/sh\ntouch {repository.parent}/ran\n")
    (repository / "tool").chmod(0o755)
    for setting in ("diff.external", "core.fsmonitor", "diff.py.textconv"):
        git(repository, "config", setting, str(repository / "tool"))
    (repository / ".gitattributes").write_text("*.py diff=py\n")
    (repository / "train.py").write_text("steps = 3\n")
    state = git_state(repository)
    assert state is not None
    assert state.diff is not None
    assert b"steps = 3" in state.diff
    assert not (repository.parent / "ran").exists()


@pytest.mark.parametrize("name", ["own", "o=wn", "lfs.own"])
def test_git_filters_are_not_run(repository: Path, name: str) -> None:
    """Filter programs of a repository and its submodules are not started."""
    ran = repository.parent / "ran"
    git(repository, "init", "-q", "part")
    git(repository / "part", "commit", "-q", "--allow-empty", "-m", "Begin")
    git(repository, "add", "part")
    git(repository, "commit", "-q", "-m", "Take a part in")
    for folder in (repository, repository / "part"):
        git(folder, "config", f"filter.{name}.clean", f"touch {ran}; cat")
        git(folder, "config", f"filter.{name}.required", "true")
        git(folder, "config", "core.fsmonitor", f"touch {ran}; false")
        (folder / ".gitattributes").write_text(f"*.py filter={name}\n")
    (repository / "train.py").write_text("steps = 3\n")
    state = git_state(repository)
    assert state is not None
    assert not ran.exists()
    if "=" in name:
        assert "diff" in (state.left_out or "")
    else:
        assert b"+steps = 3" in (state.diff or b"")


def test_missing_git_objects_are_not_fetched(repository: Path) -> None:
    """A partial clone starts no program to fetch missing objects."""
    ran = repository.parent / "ran"
    blob = git(repository, "rev-parse", "HEAD:train.py")
    (repository / ".git" / "objects" / blob[:2] / blob[2:]).unlink()
    for setting, value in {
        "core.repositoryformatversion": "1",
        "extensions.partialClone": "origin",
        "remote.origin.promisor": "true",
        "remote.origin.url": f"ext::sh -c touch% {ran}",
        "protocol.ext.allow": "always",
    }.items():
        git(repository, "config", setting, value)
    (repository / "train.py").write_text("steps = 3\n")
    state = git_state(repository)
    assert state is not None
    assert state.diff is None
    assert "diff" in (state.left_out or "")
    assert not ran.exists()


def test_links_of_a_tracker_are_allowed(tmp_path: Path) -> None:
    """W&B's links to its logs outside the run folder do not prevent a resume."""
    run, logs = tmp_path / "run", tmp_path / "run/wandb/run-1/logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to("/tmp/core.log")
    assert find_escaping_link(run) is None
    (run / "metrics.jsonl").symlink_to("wandb/run-1/logs/debug-core.log")
    assert find_escaping_link(run) == str(run / "metrics.jsonl")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a checkpoint, given by a relative path."""
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "runs" / "first" / "checkpoints" / "step_00000004"
    step.mkdir(parents=True)
    (step / MANIFEST_FILE).write_text("{}")
    (step.parent / "last").symlink_to(step.name)
    (tmp_path / "runs" / "first" / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "runs" / "first" / "starts").mkdir()
    (tmp_path / "config.yaml").write_text("seed: 1\n")  # of something else
    return Path("runs/first")


@pytest.mark.parametrize("inside", ["", "config.yaml", "checkpoints"])
def test_a_run_is_found_by_its_folder(run: Path, inside: str) -> None:
    """The run folder, its config and its checkpoints folder all lead to the run."""
    found = find_run(run / inside)
    assert (found.folder, found.checkpoint) == (run, None)
    assert found.config == run / "config.yaml"


@pytest.mark.parametrize("name", ["step_00000004", "last", "step_00000004/manifest.json"])
def test_a_checkpoint_is_found_with_its_run(run: Path, name: str) -> None:
    """A path of a checkpoint leads to the checkpoint and its run."""
    found = find_run(run / "checkpoints" / name)
    assert found.folder == run
    assert found.checkpoint == run / "checkpoints" / name.split("/")[0]
    absolute = find_run((run / "checkpoints" / name).absolute())
    assert absolute.folder == run.absolute()


def test_path_without_a_run_is_refused(run: Path, tmp_path: Path) -> None:
    """The error names the expected path."""
    with pytest.raises(NoRunError, match=r"there is no runs/second; expected a run folder"):
        find_run("runs/second")
    with pytest.raises(NoRunError, match=r"runs is not a run folder: it has no config.yaml"):
        find_run("runs")
    with pytest.raises(NoRunError, match=r" is not a run folder: it has no starts"):
        find_run(tmp_path)
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(NoRunError, match=r"file.txt is a file; expected"):
        find_run("file.txt")
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / MANIFEST_FILE).write_text("{}")
    with pytest.raises(NoRunError, match="lone is a checkpoint, and no folder above it"):
        find_run("lone")
