"""Public programs' trainings, each as a plain torch loop and with the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

import gpt
from porting import SECTIONS, Port, assert_same, code_lines, train

PORTS: list[Port] = [gpt]

every_port = pytest.mark.parametrize("port", PORTS, ids=lambda port: port.__name__)


@every_port
def test_equals_the_plain_loop(port: Port, tmp_path: Path) -> None:
    """Weights, optimizer states, averages and buffers equal the plain loop's, bit for bit.

    Stopped twice and resumed with new objects, also within an accumulation window, they are equal
    again. The plain loop's checkpoint restores its state.
    """
    plain = tmp_path / "plain"
    plain.mkdir()
    expected = port.train_plainly(plain)
    trainer = train(port, tmp_path / "straight")
    assert_same(port.state_of(trainer, tmp_path / "straight"), expected)

    steps = trainer.progress.global_step_id
    stops = (steps // 3 | 1, 2 * steps // 3 | 1)
    resumed = train(port, tmp_path / "resumed", stops)
    assert_same(port.state_of(resumed, tmp_path / "resumed"), expected)
    assert_same(port.train_plainly(plain), expected)


@every_port
def test_is_no_longer_than_the_plain_loop(port: Port) -> None:
    """The training with the trainer has no more lines of code than the plain loop."""
    _, plain, ours = (code_lines(port)[name] for name in SECTIONS)
    assert ours <= plain, f"{ours} lines with the trainer, {plain} in the plain loop"
