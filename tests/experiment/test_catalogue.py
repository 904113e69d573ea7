"""Definitions and public names of the catalogue."""

from __future__ import annotations

import importlib
import inspect
import warnings

import pytest
import torch

import robo_orchard_lab.pipeline.hooks
import robo_orchard_lab.pipeline.sinks
from robo_orchard_core.utils.config import Config, Trust
from robo_orchard_core.utils.config.build import type_hints
from robo_orchard_core.utils.config.references import resolve
from robo_orchard_lab.experiment.catalogue import CATALOGUE, DEFINITIONS, kind_of, with_definitions
from robo_orchard_lab.pipeline import PipelineHooks, PipelineHooksConfig, SimpleBatchProcessor
from robo_orchard_lab.pipeline.sinks import JsonLinesSink, LogSink, SinkConfig, TrackerSink
from robo_orchard_lab.policy.samples import Reach

# Built by the trainer from live objects.
NOT_FROM_FILES = {"OptimizerHook"}

# Missing in the oldest supported versions.
NEWER = {
    "torch.optim:Muon",  # of torch 2.9
    "torchvision.transforms.v2._misc:SanitizeKeyPoints",  # of torchvision 0.24
    "torchmetrics.classification.eer:",
    "torchmetrics.classification.logauc:",
    "torchmetrics.clustering.cluster_accuracy:",
}


def may_be_missing(reference: str) -> bool:
    """Return True if the oldest supported versions lack a name."""
    return any(reference.startswith(newer) for newer in NEWER)


@pytest.mark.parametrize("package", ["robo_orchard_lab", "torch", "torchvision", "torchmetrics"])
def test_each_entry_is_defined_in_its_module(package: str) -> None:
    """Each reference resolves to its definition, not to a re-export."""
    trust = Trust(frozenset(), DEFINITIONS)
    entries = [name for name in sorted(DEFINITIONS) if name.split(".")[0] == package]
    assert entries
    pytest.importorskip(package)
    for reference in entries:
        try:
            found = resolve(reference, trust)
        except ValueError:
            assert may_be_missing(reference), reference
            continue
        assert inspect.isclass(found) or isinstance(type_hints(found).get("return"), type), (
            f"{reference} doesn't say what it returns, so no file can have it called"
        )


KINDS = {
    "a hook": (PipelineHooks, PipelineHooksConfig),
    "a sink": (JsonLinesSink, LogSink, TrackerSink, SinkConfig),
    "a batch processor": (SimpleBatchProcessor,),
    "an optimizer": (torch.optim.Optimizer,),
    "an LR scheduler": (torch.optim.lr_scheduler.LRScheduler,),
    "a module": (torch.nn.Module,),
    "a dataset": (torch.utils.data.Dataset,),
    "a sampler": (torch.utils.data.Sampler,),
    "a loader": (torch.utils.data.DataLoader,),
    "an environment": (Reach,),
}


def test_each_entry_is_of_its_kind() -> None:
    """The kind of each entry is known without an import, so a misplaced entry is refused early."""
    trust = Trust(frozenset(), DEFINITIONS)
    for reference in DEFINITIONS:
        kind = kind_of(reference)
        assert kind is not None
        try:
            found = resolve(reference, trust)
        except ValueError:
            continue  # not installed, or newer
        cls = found if inspect.isclass(found) else type_hints(found)["return"]
        assert issubclass(cls, KINDS[kind]), reference
        others = [other for name, bases in KINDS.items() if name != kind for other in bases]
        assert not issubclass(cls, tuple(others)), reference
    assert kind_of("os:system") is None


def test_each_public_name_imports_its_definition() -> None:
    """Each public name is importable from its package."""
    for name, definition in CATALOGUE.items():
        module, _, qualname = name.rpartition(":")
        if not module or name == definition:
            continue
        with warnings.catch_warnings(action="ignore"):
            try:
                found = getattr(importlib.import_module(module), qualname)
            except (ImportError, AttributeError):
                assert may_be_missing(definition), name
                continue
        places = {
            f"{cls.__module__}:{cls.__qualname__}" for cls in getattr(found, "__mro__", [found])
        }
        assert definition in places, name  # torchmetrics keeps deprecated subclasses at its top


def test_every_hook_and_sink_is_listed() -> None:
    """Every exported hook and sink, and its config, is in the catalogue."""
    for module in (robo_orchard_lab.pipeline.hooks, robo_orchard_lab.pipeline.sinks):
        for name in set(module.__all__) - NOT_FROM_FILES:
            found = getattr(module, name)
            is_part = inspect.isclass(found) and (
                issubclass(found, PipelineHooks | Config) or name.endswith("Sink")
            )
            if is_part and not name.startswith(("MetricsSink", "SinkConfig")):
                assert f"{found.__module__}:{name}" in DEFINITIONS
                assert CATALOGUE[name] == f"{found.__module__}:{name}"


def test_only_parts_of_this_project_are_listed() -> None:
    """Functions that remove folders, start processes or read checkpoints are not listed."""
    for reference in DEFINITIONS:
        if reference.startswith("robo_orchard"):
            cls = resolve(reference, Trust(frozenset(), DEFINITIONS))
            assert inspect.isclass(cls)
            part = (PipelineHooks, Config, torch.utils.data.Dataset, torch.nn.Module, Reach)
            name = cls.__name__
            assert issubclass(cls, part) or name.endswith(("Sink", "Processor")), reference


@pytest.mark.parametrize(
    "reference",
    [
        "torch.serialization:load",
        "torch.hub:load",
        "torch.jit._serialization:load",
        "torch.utils.cpp_extension:load_inline",
        "torchvision.datasets.mnist:MNIST",
        "torchvision.datasets.cifar:CIFAR10",
        "torchvision.datasets.folder:DatasetFolder",
        "torchmetrics.image.fid:FrechetInceptionDistance",
        "torchvision.transforms.v2._misc:Lambda",
        "robo_orchard_lab.pipeline.run.durable:remove_tree",
        "robo_orchard_core.utils.config.build:CallableConfig",
    ],
)
def test_code_that_loads_downloads_or_removes_is_not_listed(reference: str) -> None:
    """Code that loads files, downloads or removes files is not listed."""
    assert reference not in DEFINITIONS


def test_names_of_code_are_replaced_by_definitions() -> None:
    """Short names are replaced under the keys of parts only, full references anywhere."""
    sgd = "torch.optim.sgd:SGD"
    assert with_definitions(
        {
            "class_type": "EMA",
            "name": "EMA",
            "a": [{"func": "torch.optim:SGD"}, "torch.optim:SGD", "like torch.optim:SGD"],
            "b": {"class_type": sgd, "c": 1},
        }
    ) == {
        "class_type": "robo_orchard_lab.pipeline.hooks.ema:EMA",
        "name": "EMA",
        "a": [{"func": sgd}, sgd, "like torch.optim:SGD"],
        "b": {"class_type": sgd, "c": 1},
    }
