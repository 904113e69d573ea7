"""Retention of checkpoints in a store."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from robo_orchard_lab.pipeline.checkpoint import (
    CheckpointInfo,
    CheckpointStore,
    ReadLimits,
    Retention,
    load_checkpoint,
)
from robo_orchard_lab.pipeline.checkpoint.reader import OpenCheckpoint


def save_all(root: Path, retention: Retention, values: list[float | None]) -> list[int]:
    """Save steps 1, 2, ... with these metrics; return the kept steps."""
    with CheckpointStore(root, retention=retention) as store:
        for step, value in enumerate(values, 1):
            store.save(
                step, {"trainer": {"step": step}}, metrics={} if value is None else {"loss": value}
            )
        return [info.step for info in store.list()]


def damage(path: Path, name: str = "trainer.json") -> None:
    """Change one bit."""
    text = bytearray((path / name).read_bytes())
    text[len(text) // 2] ^= 1
    (path / name).write_bytes(text)


LOSSES = [3.0, 1.0, None, float("nan"), 2.0, 1.0, 5.0]


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(), [1, 2, 3, 4, 5, 6, 7]),
        (Retention(keep_last=2), [6, 7]),
        (Retention(keep_last=1, keep_every=3), [3, 6, 7]),
        (Retention(keep_last=1, keep_best=2, monitor="loss"), [2, 6, 7]),
        (Retention(keep_last=1, keep_best=1, monitor="loss"), [2, 7]),
        (Retention(keep_last=1, keep_best=2, monitor="loss", mode="max"), [1, 7]),
        (Retention(keep_last=1, keep_best=3, monitor="other"), [7]),
        (Retention(keep_every=3, keep_best=1, monitor="loss"), [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_rules_keep_checkpoints(retention: Retention, left: list[int], tmp_path: Path) -> None:
    """The last, every k-th and the best stay; the older one wins a tie."""
    assert save_all(tmp_path, retention, LOSSES) == left


def test_dry_run_returns_decisions_and_reasons(tmp_path: Path) -> None:
    """A dry run removes nothing and returns the decisions of the later prune."""
    save_all(tmp_path, Retention(), [1.0, 2.0, 3.0, 4.0])
    retention = Retention(keep_last=1, keep_every=2, keep_best=1, monitor="loss")
    store = CheckpointStore(tmp_path, retention=retention)
    decisions = store.prune(dry_run=True)
    assert [(d.path.name, d.removed, d.why) for d in decisions] == [
        ("step_00000001", False, "number 1 by loss, with 1"),
        ("step_00000002", False, "its step is a multiple of 2"),
        ("step_00000003", True, "no rule keeps it"),
        ("step_00000004", False, "one of the last 1; its step is a multiple of 2"),
    ]
    assert len(store.list()) == 4
    with store:
        assert store.prune() == decisions
        assert [info.step for info in store.list()] == [1, 2, 4]


def test_newest_intact_checkpoint_is_never_removed(tmp_path: Path) -> None:
    """The newest checkpoint that verifies stays if newer ones are damaged, under any rules."""
    save_all(tmp_path, Retention(), [None] * 4)
    for step in (3, 4):
        damage(tmp_path / f"step_{step:08d}")
    with CheckpointStore(tmp_path, retention=Retention(keep_last=1)) as store:
        assert [(d.removed, d.why) for d in store.prune()] == [
            (True, "no rule keeps it"),
            (False, "the newest one that verifies"),
            (True, "no rule keeps it"),
            (False, "one of the last 1"),
        ]
        newest = store.load_newest()
    assert newest is not None
    assert newest.info.step == 2
    assert [path.name for path, _ in newest.skipped] == ["step_00000004"]


def test_nothing_is_removed_if_nothing_verifies(tmp_path: Path) -> None:
    """Damaged checkpoints may be the only ones to repair."""
    save_all(tmp_path, Retention(), [None] * 3)
    for step in (1, 2, 3):
        damage(tmp_path / f"step_{step:08d}")
    with CheckpointStore(tmp_path, retention=Retention(keep_last=1)) as store:
        assert [d.why for d in store.prune()][:2] == ["no checkpoint verifies"] * 2
        assert len(store.list()) == 3


def test_foreign_files_stay(tmp_path: Path) -> None:
    """Foreign files, directories and links stay, and so does a checkpoint with a foreign file."""
    save_all(tmp_path, Retention(), [None] * 3)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step_00000009").mkdir()
    (tmp_path / "step_9").mkdir()
    (tmp_path / "step_00000001" / "notes.txt").write_text("mine")
    damage(tmp_path / "step_00000002", "manifest.json")
    (tmp_path / "step_00000007").symlink_to("step_00000003")
    (tmp_path / ".mine.tmp").mkdir()
    before = set(os.listdir(tmp_path))
    with CheckpointStore(tmp_path, retention=Retention(keep_last=1)) as store:
        store.save(4, {})
        store.save(5, {})
        why = {d.path.name: d.why for d in store.prune()}
    assert set(os.listdir(tmp_path)) == before - {"step_00000003"} | {"step_00000005"}
    assert "files that are not of a checkpoint: notes.txt" in why["step_00000001"]
    assert "manifest.json" in why["step_00000002"]
    assert "it is a link" in why["step_00000007"] or "is a link" in why["step_00000007"]


def test_checkpoint_stays_while_it_is_read(tmp_path: Path) -> None:
    """An open checkpoint is not pruned."""
    save_all(tmp_path, Retention(), [None, None])
    with CheckpointStore(tmp_path, retention=Retention(keep_last=1)) as store:
        with OpenCheckpoint(tmp_path / "step_00000001", ReadLimits()) as opened:
            assert [d.why for d in store.prune()] == ["it is being read", "one of the last 1"]
            assert opened.load(0).parts["trainer"] == {"step": 1}
        assert [d.removed for d in store.prune()] == [True, False]
    assert not (tmp_path / "step_00000001").exists()


def test_replaced_checkpoint_stays_readable(tmp_path: Path) -> None:
    """The old checkpoint is renamed, and removed after the last reader closes."""
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"trainer": "old"})
        with OpenCheckpoint(tmp_path / "step_00000001", ReadLimits()) as opened:
            store.save(1, {"trainer": "new"})
            assert opened.load(0).parts["trainer"] == "old"
        assert store.load(1).parts["trainer"] == "new"
        store.save(2, {})
    assert sorted(os.listdir(tmp_path)) == [".lock", "last", "step_00000001", "step_00000002"]


def test_best_link_follows_removals(tmp_path: Path) -> None:
    """The link points to the best of the rest if the best checkpoint is removed."""
    save_all(tmp_path, Retention(keep_last=1, monitor="loss"), [1.0, 2.0])
    assert os.readlink(tmp_path / "best") == "step_00000002"


class Runs(RuleBasedStateMachine):
    """Runs that save, return to earlier steps and resume, while checkpoints get damaged."""

    @initialize(
        keep_last=st.none() | st.integers(1, 3),
        keep_every=st.none() | st.integers(1, 4),
        keep_best=st.integers(0, 2),
        mode=st.sampled_from(["min", "max"]),
    )
    def start(
        self, keep_last: int | None, keep_every: int | None, keep_best: int, mode: str
    ) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.retention = Retention(
            keep_last=keep_last,
            keep_every=keep_every,
            keep_best=keep_best,
            monitor="loss",
            mode="min" if mode == "min" else "max",
        )
        self.store = CheckpointStore(self.root, retention=self.retention).open()
        self.there: dict[int, tuple[int, float]] = {}  # by step: its serial and value
        self.good: set[int] = set()
        self.serial = 0

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.root)

    @rule(step=st.integers(0, 12), value=st.sampled_from([0.0, 1.0, 2.0, math.nan]))
    def save(self, step: int, value: float) -> None:
        self.store.save(step, {"trainer": {"step": step}}, metrics={"loss": value})
        self.serial += 1
        self.there[step] = (self.serial, value)
        self.good.add(step)
        self.prune(newest=step)

    @precondition(lambda self: self.good)
    @rule(data=st.data())
    def damage_one(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.good)))
        damage(self.root / f"step_{step:08d}")
        self.good.remove(step)

    @rule()
    def run_again(self) -> None:
        self.store.close()
        self.store = CheckpointStore(self.root, retention=self.retention).open()
        self.serial = max((serial for serial, _ in self.there.values()), default=0)

    @rule()
    def prune_now(self) -> None:
        would = {d.path for d in self.store.prune(dry_run=True) if d.removed}
        assert {d.path for d in self.store.prune() if d.removed} == would
        newest = max(self.good, key=lambda step: self.there[step], default=None)
        if newest is not None:
            self.prune(newest)

    def prune(self, newest: int) -> None:
        """Apply the rules to the model of the root."""
        rules = self.retention
        if rules.keep_last is None:
            return
        by_age = sorted(self.there, key=lambda step: -self.there[step][0])
        sign = 1 if rules.mode == "min" else -1
        with_value = [step for step in by_age if not math.isnan(self.there[step][1])]
        best = sorted(
            with_value, key=lambda step: (sign * self.there[step][1], self.there[step][0])
        )
        kept = {newest, *by_age[: rules.keep_last], *best[: rules.keep_best]}
        kept |= {step for step in by_age if rules.keep_every and step % rules.keep_every == 0}
        self.there = {step: found for step, found in self.there.items() if step in kept}
        self.good &= kept

    @invariant()
    def holds_what_the_rules_keep(self) -> None:
        if not hasattr(self, "store"):
            return
        infos = self.store.list()
        assert {info.step: info.serial for info in infos} == {
            step: serial for step, (serial, _) in self.there.items()
        }
        assert not [name for name in os.listdir(self.root) if name.startswith(".step")]
        verified = {int(v.path.name[5:]): v.problem for v in self.store.verify()}
        assert {step for step, problem in verified.items() if problem is None} == self.good
        self.check_links(infos)

    def check_links(self, infos: list[CheckpointInfo]) -> None:
        if infos:
            assert os.readlink(self.root / "last") == infos[-1].path.name
            best = self.retention.best(infos)
            if best and best[0].step in self.good:
                assert load_checkpoint(self.root / "best").info.step == best[0].step


Runs.TestCase.settings = settings(max_examples=25, stateful_step_count=15)
TestRuns = Runs.TestCase
