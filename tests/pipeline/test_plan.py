"""Plans of runs: text, boxes, Mermaid, plan.json and the differences at a resume."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import gan
from robo_orchard_core.utils.hook import HookContext, short_location
from robo_orchard_lab.pipeline import CHANNEL_NAMES, PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.hooks import (
    EMAConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    NonFiniteGuardConfig,
    SaveCheckpointConfig,
    StatsMonitorConfig,
)
from robo_orchard_lab.pipeline.plan import RunPlan, compare_plans
from robo_orchard_lab.report.files import Problems
from robo_orchard_lab.report.plan import read_plan
from tiny import make_trainer

HOSTILE = 'a"]; end\n  click x "javascript:alert(1)"\x1b[31m #quot; `<b>` %%{init: {}}%% é \ud800'


def note(args: PipelineHookArgs) -> None:
    """Do nothing."""


def named(name: str, channel: Any = "on_step", when: str | None = None) -> PipelineHooks:
    """Return hooks with one function."""
    hooks = PipelineHooks(name)
    hooks.register_hook(channel, HookContext.from_callable(after=note), when)
    return hooks


def plan_of(*hooks: PipelineHooks) -> RunPlan:
    return RunPlan.of(PipelineHooks.from_hooks(hooks))


def rendered(plan: RunPlan, width: int, **options: Any) -> str:
    """Return the output of rich for a terminal of some width."""
    console = Console(file=io.StringIO(), width=width, highlight=False, **options)
    console.print(plan)
    file: Any = console.file
    text: str = file.getvalue()
    return text


def many_hooks() -> RunPlan:
    """Return the plan of a trainer with several built-in hooks, in all channels."""
    return make_trainer(
        [
            EMAConfig(decay=0.9),
            LossTrackerConfig(),
            MetricsLoggerConfig(),
            NonFiniteGuardConfig(policy="skip"),
            StatsMonitorConfig(every="20 steps"),
            *(named(f"hook of {channel}", channel) for channel in CHANNEL_NAMES),
        ],
        max_step=1,
    ).plan()


def test_the_text_is_a_tree_in_timeline_order() -> None:
    """Channels are nested as they run; hooks have trigger, source, and effects where first."""
    declared = named("log", when="3 steps | last")
    declared.register_hook("on_epoch", HookContext.from_callable(note, note))
    declared.declare_effects(reads=["loss", "metrics"], requests=["log"])
    silent = named("silent")
    silent.declare_effects()
    line = f"test_plan.py:{note.__code__.co_firstlineno}"
    text = str(plan_of(declared, named("mine"), silent))
    text = re.sub(r"[\w./]+test_plan\.py", "test_plan.py", text)
    assert text.splitlines() == [
        "on_loop: one call of the trainer",
        "  on_epoch: one pass over the data",
        "    - log (PipelineHooks)",
        f"        before, after {line}",
        "        reads loss, metrics",
        "        requests log",
        "    on_step: one batch, from the data loader to the update",
        f"      - log, when 3 steps | last: after {line}",
        "      - mine (PipelineHooks)",
        f"          after {line}",
        "          reads, changes, requests: not declared",
        "      - silent (PipelineHooks)",
        f"          after {line}",
        "          reads, changes and requests nothing",
        "      on_batch: forward and backward of one batch",
        "        on_model_forward: the batch processor's forward",
        "        on_model_backward: the backward pass",
        "      on_optimizer_step: one update of the weights",
        "  on_evaluation: one evaluation",
    ]


@pytest.mark.parametrize("width", [30, 60, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    """Text and boxes fit; at 80 columns each source is on one line."""
    plan = many_hooks()
    for text in (plan.to_text(width), rendered(plan, width)):
        assert max(map(len, text.splitlines())) <= max(width, 36)
    boxes = rendered(plan, 80)
    assert boxes.count("╭") == len(CHANNEL_NAMES)
    assert boxes.splitlines()[0].startswith("╭─ on_loop  one call of the trainer ─")
    assert "│ │ ╭─ on_step" in boxes
    assert "before, after robo_orchard_lab/.../stats_monitor.py" in boxes


def test_boxes_link_to_the_sources() -> None:
    """In a terminal the line of a source is a link to the file; elsewhere there is no escape."""
    plan = plan_of(named("mine"))
    link = Path(__file__).absolute().as_uri()
    assert f";{link}\x1b\\" in rendered(plan, 80, force_terminal=True)
    assert "\x1b" not in rendered(plan, 80)


def test_hostile_names_stay_one_line_of_text() -> None:
    """Control characters, line ends and the syntax of Mermaid in a name are escaped."""
    plan = plan_of(named(HOSTILE))
    texts = [str(plan), rendered(plan, 200), plan.to_mermaid()]
    assert all("\x1b" not in text and "\n  click" not in text for text in texts)
    assert all(text.encode() for text in texts)
    [label] = re.findall(r'h0\["(.*)"\]', plan.to_mermaid())
    assert not set(label.replace("<br/>", "")) & set('"<>[]{}`%&')
    assert label.startswith("a#34;#93;#59; end")


def test_mermaid_nests_channels_and_orders_hooks() -> None:
    """A flowchart has a subgraph for each channel and arrows between hooks in order of entry."""
    text = plan_of(named("first"), named("- second"), named("3. third")).to_mermaid()
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == "flowchart TB"
    assert [line.split("[")[0] for line in lines if line.startswith("subgraph")] == [
        f"subgraph {channel}" for channel in CHANNEL_NAMES
    ]
    assert lines.count("end") == len(CHANNEL_NAMES)
    assert {"h0 --> h1", "h1 --> h2", "on_model_forward --> on_model_backward"} <= {*lines}
    assert 'h1["#45; second (PipelineHooks)<br/>' in text
    assert 'h2["3#46; third (PipelineHooks)<br/>' in text  # no list of Markdown


def test_an_attribute_for_another_purpose_is_no_declaration() -> None:
    """Lists on an instance, methods and other types count as not declared."""

    class Mine(PipelineHooks):
        changes = "loss"

        def __init__(self) -> None:
            super().__init__()
            self.requests = []  # of this user's hook
            self.register_hook("on_step", HookContext.from_callable(note))

        def reads(self) -> int:  # type: ignore[override]  # a user's method
            return 1

    declares = type("Declares", (Mine,), {"reads": ["loss"], "changes": ()})
    mine, declared = plan_of(Mine()).hooks[0], plan_of(declares()).hooks[0]
    assert (mine.reads, mine.changes, mine.requests) == (None, None, None)
    assert (declared.reads, declared.changes, declared.requests) == (("loss",), (), None)
    assert declared.effects == ["reads loss", "requests: not declared"]


def test_unnamed_bundles_show_their_own_effects() -> None:
    """Hooks of unnamed bundles have the names of their functions' contexts, if any."""
    first, second = PipelineHooks(), PipelineHooks()
    first.declare_effects(reads=["loss"])
    second.declare_effects(changes=["metrics"])
    first.register_hook("on_step", HookContext.from_callable(note, name="a"))
    second.register_hook("on_step", HookContext.from_callable(note))
    second.register_hook("on_step", HookContext.from_callable(None, note))
    root = PipelineHooks.from_hooks([first, second])
    root.register_hook("on_step", HookContext.from_callable(note, name="own"))
    plan = RunPlan.of(root)
    assert [hook.hook for hook in plan.hooks] == ["a", "PipelineHooks", "PipelineHooks", "own"]
    lines = [line.strip() for line in str(plan).splitlines()]
    assert (lines.count("reads loss"), lines.count("changes metrics")) == (1, 1)
    assert repr(plan) == str(plan)


def test_updates_of_several_optimizers_have_their_place() -> None:
    """The plan says where on_optimizer_step opens for a yielded loss."""
    model = gan.make_model()
    trainer = make_trainer(
        model=model,
        loader=gan.make_batches(),
        batch_processor=gan.GAN(),
        optimizer=gan.adams(model),  # type: ignore[arg-type]  # of one optimizer in this helper
        max_step=1,
    )
    said = "on_optimizer_step: one update of the weights, in on_batch for a yielded loss"
    assert said in trainer.plan().to_text(100)
    assert "changes model.weights, gradients, optimizer state" in str(trainer.plan())


def test_the_hook_of_a_function_without_source_is_planned() -> None:
    """A builtin has its name in place of file and line."""
    hooks = PipelineHooks("printing")
    hooks.register_hook("on_step", HookContext.from_callable(print))
    [hook] = plan_of(hooks).hooks
    assert (hook.before, hook.source, hook.link) == ("print", "print", None)


def test_locations_are_short() -> None:
    """Files of packages and far files have no inner folders; near files are complete."""
    assert short_location("src/robo_orchard_lab/pipeline/hooks/ema.py:3") == (
        "robo_orchard_lab/.../ema.py:3"
    )
    assert short_location("/x/site-packages/a/b.py:1") == "a/b.py:1"
    assert short_location("site-packages/a.py:1") == "a.py:1"
    assert short_location("train.py:10") == "train.py:10"
    assert short_location("/train.py:10") == "/train.py:10"
    assert short_location("../train.py:10") == "../train.py:10"


def resumed(folder: Path, *hooks: Any) -> None:
    """Train four steps further, from the newest checkpoint in the folder if there is one."""
    saved = SaveCheckpointConfig(every="4 steps")
    done = len([*folder.glob("checkpoints/step_*")])
    make_trainer(
        [saved, *hooks],
        run_folder=folder,
        resume_from="auto",
        max_step=4 * done + 4,
    )()


def events_of(folder: Path) -> list[tuple[str, int, str]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [(e["event"], e["step"], e["text"]) for e in found if e["event"] == "plan changed"]


def test_a_resume_shows_the_difference_of_the_plans(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Changed triggers, new and removed hooks and their order are logged, recorded and saved."""
    caplog.set_level(logging.INFO)
    resumed(tmp_path, named("log", when="2 steps"), named("old"), named("kept"))
    assert events_of(tmp_path) == []
    caplog.clear()
    resumed(tmp_path, named("kept"), named("log", when="3 steps"), named("new", "on_epoch"))
    expected = [
        "log: on_step after, 2 steps -> on_step after, 3 steps",
        "old: class PipelineHooks; on_step after, always -> not there",
        "new: not there -> class PipelineHooks; on_epoch after, always",
        "order on on_step: log, kept -> kept, log",
    ]
    messages = [r.getMessage() for r in caplog.records if r.name.endswith("pipeline.plan")]
    assert messages[0] == "the hooks differ from those of the last start:"
    assert sorted(m.strip() for m in messages[1:]) == sorted(expected)
    [(_, step, text)] = events_of(tmp_path)
    assert step == 4
    assert all(each in text for each in expected)
    saved = json.loads((tmp_path / "plan.json").read_text())
    [resume] = saved["resumes"]
    assert (resume["step"], len(resume["changes"])) == (4, 4)
    assert {hook["hook"] for hook in saved["hooks"]} >= {"kept", "log", "new"}
    shown = read_plan(tmp_path, Problems())["plan_changes"]  # in the report
    assert sorted(f"{c['what']}: {c['before']} -> {c['after']}" for c in shown) == sorted(expected)
    assert {change["step"] for change in shown} == {4}

    caplog.clear()
    resumed(tmp_path, named("kept"), named("log", when="3 steps"), named("new", "on_epoch"))
    assert not [r for r in caplog.records if r.name.endswith("pipeline.plan")]
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["resumes"] == [resume]  # earlier resumes stay


def test_a_new_run_in_the_folder_compares_nothing(tmp_path: Path) -> None:
    """A run from step 0 replaces the plan of another run."""
    make_trainer([named("a")], run_folder=tmp_path, max_step=2)()
    make_trainer([named("b")], run_folder=tmp_path, max_step=2)()
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert (events_of(tmp_path), saved["resumes"]) == ([], [])


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"hooks": 3}', b'{"hooks": [1, {"hook": []}]}', b'{"hooks": [' * 40, b"\xff"],
    ids=["empty", "list", "number", "types", "cut", "bytes"],
)
def test_a_damaged_plan_does_not_stop_a_resume(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run resumes, and writes its plan again."""
    resumed(tmp_path)
    (tmp_path / "plan.json").write_bytes(content)
    resumed(tmp_path)
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["version"] == 2
    assert len(saved["hooks"]) > 1


def test_a_plan_that_is_a_link_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A link in place of plan.json is a warning, and is replaced by the file."""
    resumed(tmp_path / "run")
    (tmp_path / "other.json").write_text('{"hooks": []}')
    (tmp_path / "run" / "plan.json").unlink()
    (tmp_path / "run" / "plan.json").symlink_to(tmp_path / "other.json")
    resumed(tmp_path / "run")
    assert "plan.json is a link" in caplog.text
    assert not (tmp_path / "run" / "plan.json").is_symlink()
    assert (tmp_path / "other.json").read_text() == '{"hooks": []}'


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_a_plan_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    """The run goes on in a folder without write permission."""
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        make_trainer([], run_folder=tmp_path, max_step=1)()
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_plan_of_an_earlier_version_differs_in_no_declaration() -> None:
    """Declarations are compared if both plans have them."""
    new = plan_of(named("log")).to_dict()["hooks"]
    old = [{key: v for key, v in hook.items() if key not in ("reads", "changes")} for hook in new]
    del old[0]["requests"]
    assert compare_plans(old, new) == []
    declared = [{**hook, "reads": ["loss"]} for hook in new]
    assert [str(change) for change in compare_plans(new, declared)] == [
        "log: reads not declared -> reads loss"
    ]
