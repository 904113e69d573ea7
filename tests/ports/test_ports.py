"""Public programs' trainings, each as a plain torch loop and with the trainer."""

from __future__ import annotations

from pathlib import Path

import pytest

import act_policy
import byol
import classification
import diffusion_policy
import dqn
import gpt
import token_weighted_lm
from launching import SCRIPTS, launch
from porting import SECTIONS, Port, check_port, code_lines

PORTS: list[Port] = [
    gpt,
    diffusion_policy,
    act_policy,
    classification,
    token_weighted_lm,
    byol,
    dqn,
]

every_port = pytest.mark.parametrize("port", PORTS, ids=lambda port: port.__name__)


@every_port
def test_equals_the_plain_loop(port: Port, tmp_path: Path) -> None:
    """Weights, optimizer states, averages and buffers equal the plain loop's, bit for bit.

    Stopped twice, also within an accumulation window, and resumed with new objects, they do again.
    """
    check_port(port, tmp_path)


def test_token_weighted_lm_equals_the_plain_loop_on_two_ranks(tmp_path: Path) -> None:
    """The mean over the tokens of all ranks equals that of a loop with DDP, also resumed."""
    launch(SCRIPTS / "port_on_ranks.py", "token_weighted_lm", tmp_path)


@every_port
def test_is_no_longer_than_the_plain_loop(port: Port) -> None:
    """The training with the trainer has no more lines of code than the plain loop."""
    _, plain, ours = (code_lines(port)[name] for name in SECTIONS)
    assert ours <= plain, f"{ours} lines with the trainer, {plain} in the plain loop"
