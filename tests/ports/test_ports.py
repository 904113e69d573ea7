"""Public programs' trainings, each as a plain torch loop and with the trainer."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import act_policy
import byol
import classification
import dcgan
import diffusion_policy
import dqn
import gpt
import sac
import token_weighted_lm
import vqgan
from launching import SCRIPTS, launch
from porting import SECTIONS, Port, check_file, check_port, code_lines, in_precision
from robo_orchard_lab.testing import prove_resume

WITH_SEVERAL_OPTIMIZERS: list[Port] = [dcgan, vqgan, sac]
PORTS: list[Port] = [
    *WITH_SEVERAL_OPTIMIZERS,
    gpt,
    diffusion_policy,
    act_policy,
    classification,
    token_weighted_lm,
    byol,
    dqn,
]

SEQUENTIAL_LR = "ignore:The epoch parameter in `scheduler.step:UserWarning"
"""Warning of torch 2.8's own SequentialLR, which passes the deprecated argument."""

every_port = pytest.mark.parametrize("port", PORTS, ids=lambda port: port.__name__)


@pytest.mark.filterwarnings(SEQUENTIAL_LR)
@every_port
def test_equals_the_plain_loop(port: Port, tmp_path: Path) -> None:
    """Weights, optimizer states, averages and buffers equal the plain loop's, bit for bit.

    Stopped twice, also within an accumulation window, and resumed with new objects, they do again.
    """
    check_port(port, tmp_path)


def test_token_weighted_lm_equals_the_plain_loop_on_two_ranks(tmp_path: Path) -> None:
    """The mean over the tokens of all ranks equals that of a loop with DDP, also resumed."""
    launch(SCRIPTS / "port_on_ranks.py", "token_weighted_lm", tmp_path)


@pytest.mark.parametrize("port", WITH_SEVERAL_OPTIMIZERS, ids=lambda port: port.__name__)
def test_several_optimizers_equal_the_plain_loop_in_bf16(port: Port, tmp_path: Path) -> None:
    """Weights and states of all optimizers equal the plain loop's under autocast, too."""
    check_port(in_precision(port, "bf16"), tmp_path)


@pytest.mark.parametrize("port", WITH_SEVERAL_OPTIMIZERS, ids=lambda port: port.__name__)
def test_several_optimizers_equal_the_plain_loop_on_two_ranks(port: Port, tmp_path: Path) -> None:
    """Weights and states on two ranks equal those of a loop that averages gradients by hand.

    So do those of the experiment file.
    """
    launch(SCRIPTS / "port_on_ranks.py", port.__name__, tmp_path, "no", "bf16")


@pytest.mark.filterwarnings(SEQUENTIAL_LR)
@pytest.mark.parametrize(
    "port", [classification, diffusion_policy, *WITH_SEVERAL_OPTIMIZERS], ids=lambda p: p.__name__
)
def test_experiment_file_trains_the_same(port: Port, tmp_path: Path) -> None:
    """The port's experiment file, stopped and resumed, ends in the plain loop's state."""
    check_file(port, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("port", "stops"), [(gpt, [6, 19]), (dqn, [5, 24]), (vqgan, [7, 12])])
def test_resume_is_proven(port: Port, stops: list[int]) -> None:
    """Every step of the resumed training equals the uninterrupted one, in separate processes."""
    prove_resume(port.build, None, stops).check()


def test_data_that_depends_on_the_model_resumes_on_two_ranks(tmp_path: Path) -> None:
    """Each rank's environment acts with the newest weights, also in the step after a resume."""
    launch(SCRIPTS / "resume_port_on_ranks.py", "dqn", tmp_path, 5, 24)


@every_port
def test_is_no_longer_than_the_plain_loop(port: Port) -> None:
    """The training with the trainer has no more lines of code than the plain loop."""
    _, plain, ours = (code_lines(port)[name] for name in SECTIONS)
    assert ours <= plain, f"{ours} lines with the trainer, {plain} in the plain loop"


@every_port
def test_the_documented_lines_are_counted(port: Port) -> None:
    """The table in migrate_plain_loop.md has the lines of the plain loop and of the trainer."""
    page = (Path(__file__).parents[2] / "docs/how_to/migrate_plain_loop.md").read_text("utf-8")
    found = re.findall(rf"\| \[{port.__name__}\.py\].*\| (\d+) \| (\d+) \|\n", page)
    _, plain, ours = (code_lines(port)[name] for name in SECTIONS)
    assert found == [(str(plain), str(ours))]
