"""Tests of counts of device syncs and collectives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import all_reduce

from launching import SCRIPTS, environment, without_greetings
from robo_orchard_core.utils.hook import HookContext
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.testing import count_collectives, count_host_reads, run_hook

scalar = torch.tensor(2.0)
vector = torch.arange(4.0)
mask = vector > 1


def fill(where: torch.Tensor, values: Any) -> None:
    vector.clone()[where] = values


@pytest.mark.parametrize(
    ("read", "seen"),
    [
        (lambda: scalar.item(), ["item"]),
        (lambda: float(scalar), ["item"]),
        (lambda: int(scalar), ["item"]),
        (lambda: bool(scalar), ["item"]),
        (lambda: 1 if scalar > 1 else 0, ["item"]),
        (lambda: [1, 2, 3][torch.tensor(1)], ["item"]),
        (lambda: vector[torch.tensor(1)], ["item"]),
        (lambda: f"{scalar:.2f}", ["item"]),
        (lambda: max(vector[:2]), ["item"]),
        (lambda: np.float64(scalar), ["item"]),
        (lambda: 2.0 in vector, ["item"]),
        (lambda: vector.tolist(), ["tolist"]),
        (lambda: vector.numpy(), ["numpy"]),
        (lambda: np.asarray(vector), ["numpy"]),
        (lambda: torch.utils.dlpack.from_dlpack(vector), ["dlpack"]),
        (lambda: str(vector), ["repr"]),
        (lambda: vector.cpu(), ["cpu"]),
        (lambda: vector.clone().cpu().numpy(), ["cpu"]),
        (lambda: scalar.clone().cpu().item(), ["cpu"]),
        (lambda: [vector.cpu(), vector.cpu()], ["cpu", "cpu"]),
        (lambda: (vector.cpu(), vector.tolist()), ["cpu", "tolist"]),
        (lambda: [row.tolist() for row in vector.cpu().view(2, 2)], ["cpu"]),
        (lambda: torch.stack([scalar.cpu(), scalar.cpu()]).sum().item(), ["cpu", "cpu"]),
        (lambda: (vector.cpu() + vector).tolist(), ["cpu", "tolist"]),
        (lambda: torch.tensor([scalar, scalar]), ["torch.tensor of tensors"]),
        (lambda: torch.equal(vector, vector), ["equal"]),
        (lambda: torch.allclose(vector, vector), ["allclose"]),
        (lambda: vector.nonzero(), ["nonzero"]),
        (lambda: vector.unique(), ["unique2"]),
        (lambda: vector[mask], ["index"]),
        (lambda: fill(mask, torch.ones(2)), ["index_put"]),
    ],
)
def test_a_read_is_counted_once(read: Callable[[], Any], seen: list[str]) -> None:
    """A value copied to the host is one read for any operation."""
    with count_host_reads() as reads:
        read()
    assert [read.what for read in reads] == seen


@pytest.mark.parametrize(
    "work",
    [
        lambda: vector.mean() + scalar,
        lambda: vector[torch.tensor([0, 2])],
        lambda: fill(mask, 0.0),
        lambda: torch.where(mask, vector, scalar),
        lambda: sum(vector),
        lambda: vector.isfinite().all(),
        lambda: torch.tensor([1.0, 2.0]),
        lambda: torch.stack([scalar, scalar]),
        lambda: vector.clone().mul_(scalar).add_(scalar),
        lambda: vector.shape[0] + vector.numel() + len(vector),
        lambda: vector.to(torch.float64).to(vector.device),
        lambda: torch.nn.utils.clip_grad_norm_([torch.nn.Parameter(vector)], 1.0),
    ],
)
def test_work_on_the_device_is_not_counted(work: Callable[[], Any]) -> None:
    """Operations between tensors do not wait."""
    with count_host_reads() as reads:
        work()
    assert reads == []


def test_copies_from_a_device_are_counted() -> None:
    """Blocking copies to the host count, for all devices or one kind of device."""
    with FakeTensorMode(), count_host_reads() as all_reads, count_host_reads("cuda") as reads:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        there.to("cpu")
        there.to("cpu", torch.float64)
        here.copy_(there)
        there.cpu()
        there.to("cpu", non_blocking=True)
        here.copy_(there, non_blocking=True)
        here.copy_(there, True)
        there.double()
        here.cpu()
    copies = ["copy to the host"] * 3
    assert [read.what for read in reads] == [*copies, "cpu"]
    assert [read.what for read in all_reads] == [*copies, "cpu", "cpu"]


def test_counting_ends_with_the_block() -> None:
    """Nothing is counted after the block, not after an error either; nested blocks count apart."""
    with pytest.raises(ZeroDivisionError), count_host_reads() as outer:  # noqa: PT012 - a scope
        with count_host_reads() as inner:
            scalar.item()
        scalar.item()
        raise ZeroDivisionError
    scalar.item()
    vector.tolist()
    assert (len(inner), len(outer)) == (1, 2)


class Reader(PipelineHooks):
    def __init__(self) -> None:
        super().__init__("reader")
        self.register_hook("on_step", HookContext.from_callable(after=self._read))

    def _read(self, args: PipelineHookArgs) -> None:
        read_it(args)


def read_it(args: PipelineHookArgs) -> None:
    assert args.loss is not None
    args.loss.item()


class Callable_:  # noqa: N801
    def __call__(self, args: PipelineHookArgs) -> None:
        read_it(args)


def registered(when: str | None, function: Any, role: str = "after") -> PipelineHooks:
    hooks = PipelineHooks("bundle")
    hooks.register_hook("on_batch", HookContext.from_callable(**{role: function}), when)
    return hooks


@pytest.mark.parametrize("when", [None, "1 step"])
@pytest.mark.parametrize(
    "function",
    [read_it, lambda args: read_it(args), partial(read_it), Callable_(), Callable_().__call__],
    ids=["function", "lambda", "partial", "object", "bound method"],
)
def test_a_read_is_attributed_to_its_hook(function: Any, when: str | None) -> None:
    """A read in a method or in a plain function is that of its hook, with and without a trigger."""
    with count_host_reads() as reads:
        run_hook(registered(when, function), steps=1)
    (read,) = [read for read in reads if read.hook]
    assert read.hook == "bundle"
    assert read.places[0].function == "read_it"
    assert all(place.file == __file__ for place in read.places)


def test_a_read_has_the_lines_up_to_its_hook() -> None:
    """Calls are listed from the reading line to the registered method."""
    with count_host_reads() as reads:
        run_hook(Reader(), steps=1)
    (read,) = [read for read in reads if read.hook == "reader"]
    assert [place.function for place in read.places] == ["read_it", "Reader._read"]
    assert str(read).startswith("item by hook 'reader' at test_counting.py:")


def test_reads_of_the_trainer_are_marked() -> None:
    """Reads at logging points are marked; other reads, such as the model's, have no hook."""

    class Model(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
            input.sum().item()
            return super().forward(input)

    def publish(args: PipelineHookArgs) -> None:
        assert args.loss is not None
        # With a dimension, it stays a tensor until the logging point, as one of a device does.
        args.metrics.publish("loss", args.loss.reshape(1))

    with count_host_reads() as reads:
        run_hook(registered(None, publish), steps=2, model=lambda: Model(4, 2))
    logging = [read for read in reads if read.at_commit]
    assert {read.hook for read in reads} == {None}
    assert all(" by the trainer at " in str(read) for read in logging)
    assert len(logging) == 2
    of_model = [str(read) for read in reads if "Model.forward" in str(read)]
    assert len(of_model) == 2
    assert of_model[0].startswith("item by no hook at test_counting.py:")


def test_collectives_are_counted_until_the_block_ends() -> None:
    """The functions are replaced under every name in a module, then restored."""
    original = dist.all_reduce
    with pytest.raises(ValueError, match="process group"), count_collectives() as calls:  # noqa: PT012 - a scope
        assert dist.all_reduce is all_reduce is not original
        all_reduce(scalar)  # fails, and is counted
    assert dist.all_reduce is all_reduce is original
    assert [(call.what, call.hook) for call in calls] == [("all_reduce", None)]


def test_collectives_are_counted(tmp_path: Path) -> None:
    """Each call counts once under any name; DDP's own reductions do not count."""
    script = SCRIPTS / "collectives_in_a_group.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path / "store")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = without_greetings(done.stdout).splitlines()
    assert lines[:14] == [
        "all_reduce main",
        "all_reduce main",
        "all_gather main",
        "all_gather_into_tensor main",
        "all_gather_object main",
        "broadcast main",
        "broadcast_object_list main",
        "reduce main",
        "gather main",
        "scatter main",
        "barrier main",
        "all_reduce main",
        "all_reduce main",
        "DDP:",
    ]
    assert len(lines) == 16
    for line in lines[14:]:
        assert line.startswith("all_reduce by hook 'planted' at collectives_in_a_group.py:")
        assert line.endswith("in main.<locals>.exchange")
