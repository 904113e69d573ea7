"""Pages of runs: content of a real run, hostile and damaged files, safety of the page."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from base64 import b64encode
from hashlib import sha256
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robo_orchard_lab.pipeline import PIPELINE_CHANNELS
from robo_orchard_lab.pipeline.sinks import read_metrics
from robo_orchard_lab.report.listing import summarize
from robo_orchard_lab.report.page import render, write
from robo_orchard_lab.report.story import read_story
from run_folders import HOSTILE, Page, record, write_metrics

FILES = [
    "run_state.json",
    "metrics.jsonl",
    "events.jsonl",
    "plan.json",
    "config.yaml",
    "starts/0001.json",
    "checkpoints/step_00000014/manifest.json",
    "media/index.jsonl",
]


@pytest.fixture
def run(recorded: Path, tmp_path: Path) -> Path:
    """Return a copy of a recorded run."""
    return Path(shutil.copytree(recorded, tmp_path / "first", symlinks=True))


def test_the_story_of_a_run_is_complete(recorded: Path) -> None:
    """A page has the outcome, each logged value, evaluations, events, checkpoints and hooks."""
    story = Page(render([recorded])).data["runs"][0]
    verdict = story["verdict"]
    assert (verdict["state"], verdict["steps"], verdict["epochs"]) == ("completed", 14, 2)
    logged = [
        (value.step, value.value)
        for found in read_metrics(recorded / "metrics.jsonl")
        for value in found.values
        if value.name == "loss/total"
    ]
    loss = story["series"]["loss/total"]
    assert [*zip(loss["x"], loss["y"], strict=True)] == logged
    assert len(logged) == 14
    [column] = story["evaluations"]["columns"]
    rows = story["evaluations"]["rows"]
    best_step, best = min(rows, key=lambda row: row[1])
    assert [row[0] for row in rows] == [7, 14]
    assert column == {"name": "eval/val/loss", "mode": "min", "best_step": best_step, "best": best}
    kinds = [event["event"] for event in story["events"]]
    assert kinds == ["start", "evaluation", "save", "evaluation", "save", "end"]
    assert [c["step"] for c in story["checkpoints"]] == [7, 14]
    assert [c["damage"] for c in story["checkpoints"]] == ["", ""]
    assert story["checkpoints"][1]["links"] == ["last"]
    hooks = {(hook["channel"], hook["hook"]) for hook in story["plan"]}
    assert {("on_step", "OptimizerHook"), ("on_epoch", "validation")} <= hooks
    assert story["environment"]["versions"]["torch"]
    assert story["problems"] == []


def test_a_page_makes_no_request_and_runs_its_own_scripts_alone(run: Path) -> None:
    """No tag names an address, and the security policy admits the page's scripts by digest."""
    page = render([run])
    parsed = Page(page)
    for tag, attributes in parsed.tags:
        assert not {"src", "srcset", "action"} & set(attributes)
        assert attributes.get("href", "data:,") == "data:,", tag
        assert not any(name.startswith("on") for name in attributes)
    policy = next(a["content"] for _, a in parsed.tags if "http-equiv" in a) or ""
    assert policy.startswith("default-src 'none'; ")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    [style] = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(scripts) == 2
    for source in (*scripts, style):
        assert f"'sha256-{b64encode(sha256(source.encode()).digest()).decode()}'" in policy
    assert "unsafe" not in policy
    assert "innerHTML" not in scripts[1]


def test_the_page_nests_channels_as_they_run() -> None:
    """The page's script, which can't import them, has the parents of all channels."""
    script = resources.files("robo_orchard_lab.report").joinpath("assets/page.js").read_text()
    found = re.search(r"NESTING = \{(.*)\}", script)
    assert found is not None
    nesting = dict(re.findall(r'(\w+): "(\w+)"', found[1]))
    assert nesting == {each.name: each.parent for each in PIPELINE_CHANNELS if each.parent}


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    """Markup in names of runs, hooks, metrics, events and files adds no tag to a page."""
    folder = write_metrics(tmp_path / "<b>run", [record(1, **{HOSTILE: 1.0, "eval/a/loss": 2.0})])
    hook = {"channel": HOSTILE, "hook": "<script>alert(1)</script>", "when": HOSTILE}
    (folder / "plan.json").write_text(json.dumps({"hooks": [hook]}))
    (folder / "events.jsonl").write_text(json.dumps({"event": HOSTILE, "text": HOSTILE}) + "\n")
    error = {"type": HOSTILE, "message": HOSTILE, "hook": HOSTILE}
    (folder / "run_state.json").write_text(json.dumps({"state": "failed", "error": error}))
    (folder / "config.yaml").write_text(json.dumps({"name": HOSTILE, "hooks": {HOSTILE: {}}}))
    page = render([folder])
    harmless = Page(render([write_metrics(tmp_path / "other", [record(1, loss=1.0)])]))
    parsed = Page(page)
    assert [tag for tag, _ in parsed.tags] == [tag for tag, _ in harmless.tags]
    story = parsed.data["runs"][0]
    assert HOSTILE in story["series"]
    assert story["plan"][0]["hook"] == "<script>alert(1)</script>"
    assert story["verdict"]["error"]["message"] == HOSTILE
    assert page.count("</script>") == 3
    assert "alert(1)</" not in page


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe\x00", b"[]", b"null\n", b'{"state": [], "hooks": {"a": 1}, "files": [1]}\n'],
    ids=["empty", "bytes", "list", "null", "types"],
)
def test_damaged_files_are_problems_of_the_page(run: Path, file: str, content: bytes) -> None:
    """A page of a run with a damaged file has the content of all other files."""
    (run / file).parent.mkdir(parents=True, exist_ok=True)
    (run / file).write_bytes(content)
    story = read_story(run)
    assert story["verdict"]["steps"] == 14
    if file != "metrics.jsonl":
        assert len(story["series"]["loss/total"]["x"]) == 14
    if file == "run_state.json":
        assert story["verdict"]["state"] == "unknown"
    if content == b"\xff\xfe\x00":
        damaged = story["problems"] or [c["damage"] for c in story["checkpoints"]]
        assert any(Path(file).name in text for text in damaged)


@given(st.sampled_from(FILES), st.binary(max_size=200), st.integers(0, 2000))
@settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])
def test_no_bytes_in_a_file_end_a_report(
    recorded: Path, tmp_path_factory: pytest.TempPathFactory, file: str, noise: bytes, at: int
) -> None:
    """Bytes that overwrite any part of any file, as by a bad disk, never raise."""
    folder = tmp_path_factory.mktemp("noise") / "run"
    shutil.copytree(recorded, folder, symlinks=True)
    target = folder / file
    target.parent.mkdir(parents=True, exist_ok=True)
    data = target.read_bytes() if target.exists() else b'{"name": "a", "file": "a.png"}\n' * 3
    target.write_bytes(data[:at] + noise + data[at + len(noise) :])
    assert Page(render([folder])).data["runs"][0]["name"]


def test_links_and_pipes_in_a_run_folder_are_not_read(run: Path, tmp_path: Path) -> None:
    """A page has nothing of a file that a link in the run folder names, and waits for no pipe."""
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"hooks": [{"channel": "on_loop", "hook": "secret"}]}))
    (run / "plan.json").unlink()
    (run / "plan.json").symlink_to(secret)
    (run / "events.jsonl").unlink()
    os.mkfifo(run / "events.jsonl")
    page = render([run])
    story = Page(page).data["runs"][0]
    assert (story["plan"], [p.split()[0] for p in story["problems"]]) == (
        [],
        ["events.jsonl", "plan.json"],
    )
    assert [event["event"] for event in story["events"]] == ["save", "save"]


def test_folders_that_lead_out_are_not_read(run: Path, tmp_path: Path) -> None:
    """A page embeds no image and shows no metric of a folder outside that a link names."""
    private = tmp_path / "private"
    write_metrics(private, [record(1, secret=1.0)])
    (private / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    entry = {"name": "a", "kind": "image", "file": "photo.png"}
    (private / "index.jsonl").write_text(json.dumps(entry) + "\n")
    (run / "media").symlink_to(private)
    sink = {"class_type": "JsonLinesSink", "path": "media/metrics.jsonl"}
    (run / "config.yaml").write_text(json.dumps({"hooks": {"log": {"sinks": [sink]}}}))
    story = read_story(run)
    assert (story["media"], "secret" in story["series"]) == ([], False)
    assert "media is a link out of the run folder, and is not read" in story["problems"]
    (run / "media").unlink()
    (run / "media" / "inner").mkdir(parents=True)
    (run / "media" / "out").symlink_to(private)
    lines = [json.dumps({**entry, "file": f"{name}/photo.png"}) for name in ("out", "inner")]
    (run / "media" / "index.jsonl").write_text("\n".join(lines))
    assert [item["problem"] for item in read_story(run)["media"]] == [
        "inner/photo.png is missing or can't be read",
        "the index names no file within the folder",
    ]


def test_starts_and_checkpoints_behind_links_are_not_read(run: Path, tmp_path: Path) -> None:
    """Links out of the run folder show no commit, command or checkpoint of another folder."""
    private = tmp_path / "private"
    for name in ("starts", "checkpoints/step_00000001"):
        (private / name).mkdir(parents=True)
    (private / "starts" / "0001.json").write_text('{"command": "secret"}')
    (private / "checkpoints" / "step_00000001" / "manifest.json").write_text("{}")
    for name in ("starts", "checkpoints"):
        shutil.rmtree(run / name, ignore_errors=True)
        (run / name).symlink_to(private / name)
    story = read_story(run)
    assert (story["environment"]["command"], story["checkpoints"]) == ("", [])
    for name in ("starts", "checkpoints"):
        assert f"{name} is a link out of the run folder, and is not read" in story["problems"]
    (run / "checkpoints").unlink()
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step_00000001").symlink_to(private / "checkpoints" / "step_00000001")
    assert read_story(run)["checkpoints"] == []


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    """A page of a folder without files says what is missing."""
    story = Page(render([tmp_path])).data["runs"][0]
    assert [problem.partition(":")[0] for problem in story["problems"]] == [
        "there are no metrics",
        "there is no run_state.json",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("completed", ("completed", "", None)),
        ("completed: no progress", ("stopped", "no progress", None)),
        ("failed: KeyError: 'x'", ("failed", "KeyError: 'x'", None)),
        (None, ("failed", "", "Killed")),
    ],
)
def test_the_last_event_is_the_outcome_of_a_run_whose_state_was_not_written(
    run: Path, text: str | None, expected: tuple[str, str, str | None]
) -> None:
    """A state that a full disk left at running is out of date; without an end, it was a kill."""
    state = json.loads((run / "run_state.json").read_text())
    state["state"], state["process"]["pid"] = "running", 2**22 - 1
    (run / "run_state.json").write_text(json.dumps(state))
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)[:-1]
    end = [] if text is None else [json.dumps({"event": "end", "step": 14, "text": text}) + "\n"]
    (run / "events.jsonl").write_text("".join(lines + end))
    verdict = read_story(run)["verdict"]
    error = verdict["error"] and verdict["error"]["type"]
    assert (verdict["state"], verdict["reason"], error) == expected
    assert summarize(run).state == expected[0]


def test_a_checkpoint_with_a_missing_byte_is_damaged(run: Path) -> None:
    """The state of a checkpoint compares sizes of files, and names the file."""
    file = run / "checkpoints" / "step_00000014" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    damage = [c["damage"] for c in read_story(run)["checkpoints"]]
    assert damage[0] == ""
    assert damage[1].startswith("model.safetensors has ")


def test_a_comparison_shows_differences_alone(tmp_path: Path) -> None:
    """The data of a comparison has the differing fields, and runs by distinct names."""
    for name, lr in (("a", 0.1), ("b", 0.2)):
        folder = write_metrics(tmp_path / name / "run", [record(1, **{"eval/val/loss": lr})])
        config = {"name": "same", "seed": 0, "optimizer": {"lr": lr}}
        (folder / "config.yaml").write_text(json.dumps(config))
    data = Page(render([tmp_path / "a" / "run", tmp_path / "b" / "run"], sort="eval/val/loss")).data
    assert data["differences"] == [{"path": "optimizer.lr", "values": ["0.1", "0.2"]}]
    assert [run["name"] for run in data["runs"]] == ["a/run", "b/run"]
    assert data["sort"] == "eval/val/loss"


def test_a_run_within_another_run_has_a_name(tmp_path: Path) -> None:
    """A comparison names a run by its folder, also if the other run is inside of it."""
    runs = [write_metrics(tmp_path / name, [record(1, loss=1.0)]) for name in ("a", "a/b")]
    assert [run["name"] for run in Page(render(runs)).data["runs"]] == ["a", "a/b"]


def test_a_run_without_a_configuration_differs_in_nothing(tmp_path: Path) -> None:
    """The differences of a comparison are those of the runs that recorded a configuration."""
    for name, lr in (("a", 0.1), ("b", 0.2), ("c", None)):
        folder = write_metrics(tmp_path / name, [record(1, loss=1.0)])
        if lr is not None:
            config = {"seed": 0, "optimizer": {"lr": lr}}
            (folder / "config.yaml").write_text(json.dumps(config))
    data = Page(render([tmp_path / name for name in "abc"])).data
    assert data["differences"] == [{"path": "optimizer.lr", "values": ["0.1", "0.2", None]}]


def test_a_page_names_the_trace(run: Path) -> None:
    """The data has name and size of trace.json, if the run has one."""
    assert read_story(run)["trace"] is None
    (run / "trace.json").write_text("{}")
    assert read_story(run)["trace"] == {"file": "trace.json", "size_bytes": 2}


def test_images_are_embedded_by_their_content(run: Path) -> None:
    """A page embeds images, texts and tables, and names a file that is none, or outside."""
    media = run / "media"
    media.mkdir()
    (media / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    (media / "b.png").write_text("<svg onload=alert(1)>")
    (media / "d").mkdir()
    (media / "d" / "1.csv").write_text('truth,"a, b"\n3,<b>\n')
    (media / "e.md").write_text("# <b>")
    (media / "f.json").write_text('{"lr": 0.1}')
    entries = [
        {"name": "a", "step": 3, "kind": "image", "file": "a.png", "caption": HOSTILE},
        {"name": "b", "file": "b.png"},
        {"name": "c", "file": "../run_state.json"},
        {"name": "d", "kind": "table", "file": "d/1.csv"},
        {"name": "e", "kind": "text", "file": "e.md"},
        {"name": "f", "kind": "hyperparameters", "file": "f.json"},
    ]
    (media / "index.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = {item["name"]: item for item in read_story(run)["media"]}
    assert found["a"]["data"].startswith("data:image/png;base64,")
    assert found["b"]["problem"] == "b.png is no image"
    assert found["c"]["problem"] == "the index names no file within the folder"
    assert (found["d"]["columns"], found["d"]["rows"]) == (["truth", "a, b"], [["3", "<b>"]])
    assert (found["e"]["text"], found["f"]["rows"]) == ("# <b>", [["lr", "0.1"]])


def test_a_page_replaces_the_old_one_or_leaves_it(tmp_path: Path) -> None:
    """A failed write, as on a full disk, leaves the old page, and no other file."""
    write(tmp_path / "report.html", "old")
    write(tmp_path / "report.html", "new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write(tmp_path / "folder", "page")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path / "report.html", "page" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "report.html").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["folder", "report.html"]
