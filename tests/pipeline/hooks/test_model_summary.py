"""The table of a model's size."""

from __future__ import annotations

import logging

import pytest
import torch
from accelerate import Accelerator

from robo_orchard_lab.pipeline import PipelineHookArgs
from robo_orchard_lab.pipeline.hooks.freeze import FreezeHookConfig
from robo_orchard_lab.pipeline.hooks.model_summary import (
    ModelSummaryConfig,
    ModuleSize,
    summarize,
)
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.testing import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
)
from tiny import make_model, make_trainer

LOGGER = "robo_orchard_lab.pipeline.hooks.model_summary"


class Policy(torch.nn.Module):
    """Model with nested, tied and half-precision modules, a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.token = torch.nn.Parameter(torch.zeros(1, 8))
        self.encoder = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU()
        )
        self.encoder[0].requires_grad_(False)
        self.embed = torch.nn.Embedding(32, 16)
        self.head = torch.nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight
        self.small = torch.nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
        self.act = torch.nn.ReLU()


def test_modules_and_total() -> None:
    """Each module counts its parameters once, and buffers only in the size."""
    size = summarize(Policy())
    buffers = 4 * (16 + 16) + 8  # BatchNorm's statistics and counter
    assert size.parts == (
        ModuleSize("(itself)", "Policy", 8, 0, 32),
        ModuleSize("encoder", "Sequential", 32, 144, 4 * 176 + buffers),
        ModuleSize("embed", "Embedding", 512, 0, 2048),
        ModuleSize("small", "Linear", 16, 0, 32),
    )
    assert size.total == ModuleSize("total", "Policy", 568, 144, 32 + 704 + buffers + 2048 + 32)
    everything = sum(parameter.numel() for parameter in Policy().parameters())
    assert size.total.trainable + size.total.frozen == everything


def test_depth() -> None:
    """Deeper levels have rows of their own; depth 0 shows only the total."""
    assert [part.name for part in summarize(Policy(), depth=2).parts] == [
        "(itself)",
        "encoder.0",
        "encoder.1",
        "embed",
        "small",
    ]
    assert summarize(Policy(), depth=0).parts == ()
    assert {summarize(Policy(), depth=depth).total for depth in (0, 1, 2, 5)} == {
        summarize(Policy()).total
    }


def test_table_is_aligned() -> None:
    """Names are left-aligned, numbers right-aligned, with thousands separators."""
    model = torch.nn.Sequential(torch.nn.Linear(4096, 1024), torch.nn.Linear(1024, 3))
    assert str(summarize(model)) == (
        "module  type        trainable  frozen    MiB\n"
        "0       Linear      4,195,328       0  16.00\n"
        "1       Linear          3,075       0   0.01\n"
        "total   Sequential  4,198,403       0  16.02"
    )


def test_compiled_models_have_plain_names() -> None:
    """Compiling the model or a submodule changes nothing."""
    plain = summarize(make_model(), depth=2)
    part = make_model()
    part.add_module("0", torch.compile(part.get_submodule("0"), backend="eager"))  # type: ignore[arg-type]  # is one
    compiled = torch.compile(make_model(), backend="eager")
    assert summarize(part, depth=2) == plain
    assert summarize(compiled, depth=2) == plain  # type: ignore[arg-type]  # is one


def test_lazy_parameters_count_as_zero() -> None:
    """Parameters without a shape yet count as 0."""
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Linear(4, 2))
    assert summarize(model).total == ModuleSize("total", "Sequential", 10, 0, 40)


def test_empty_model() -> None:
    """A model without tensors has a table with a total."""
    assert str(summarize(torch.nn.ReLU())).splitlines()[1].split() == [
        "total",
        "ReLU",
        "0",
        "0",
        "0.00",
    ]


def test_table_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """One record at the start of the run counts parameters frozen by earlier hooks."""
    with caplog.at_level(logging.INFO, logger=LOGGER):
        make_trainer(
            [FreezeHookConfig(patterns=["0.*"]), ModelSummaryConfig(depth=1)], max_epoch=2
        )()
    (record,) = [record for record in caplog.records if record.name == LOGGER]
    assert record.getMessage().splitlines() == [
        "the model:",
        "module  type        trainable  frozen   MiB",
        "0       Linear              0      40  0.00",
        "2       Linear             18       0  0.00",
        "total   Sequential         18      40  0.00",
    ]


def test_only_the_main_process_logs(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks log nothing."""
    args = PipelineHookArgs(
        PipelineRun.standalone(accelerator=Accelerator(cpu=True), model=make_model())
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with (
        caplog.at_level(logging.INFO, logger=LOGGER),
        ModelSummaryConfig()().begin("on_loop", args),
    ):
        pass
    assert not caplog.records


def test_hook_contract() -> None:
    """The hook reads no tensors, changes no weights and restores its state."""
    assert_no_device_sync(ModelSummaryConfig())
    assert_weights_unchanged(ModelSummaryConfig())
    assert_state_round_trip(ModelSummaryConfig(), stop_at=3)


def test_invalid_depths_are_refused() -> None:
    """A negative depth is refused when the config is built."""
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        ModelSummaryConfig(depth=-1)
