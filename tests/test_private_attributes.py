"""Private attributes of other packages: a complete list, each with a reason and a fallback."""

from __future__ import annotations

import ast
import builtins
import ctypes
import logging
import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.state import GradientState
from huggingface_hub import PyTorchModelHubMixin
from pydantic import BaseModel, field_serializer
from torch.distributed import HashStore  # type: ignore[attr-defined]  # documented
from torchmetrics import MeanSquaredError

from robo_orchard_core.utils.config import Config
from robo_orchard_core.utils.config.references import parametrization
from robo_orchard_lab.pipeline.batch_processor import multiply_all
from robo_orchard_lab.pipeline.data import fetching
from robo_orchard_lab.pipeline.data.fetching import RngIsolation, seed_rng
from robo_orchard_lab.pipeline.distributed.job_store import JobStore
from robo_orchard_lab.pipeline.errors import PipelineStateError
from robo_orchard_lab.pipeline.gradient_norm import total_norm
from robo_orchard_lab.pipeline.hooks import TorchProfilerHookConfig
from robo_orchard_lab.pipeline.metrics import resolve
from robo_orchard_lab.pipeline.metrics.accumulators import MetricValueError
from robo_orchard_lab.pipeline.metrics.torchmetrics import TorchMetrics
from robo_orchard_lab.pipeline.model import copy_all, uncompiled
from robo_orchard_lab.pipeline.pretrained_folder import config_json
from robo_orchard_lab.testing import count_host_reads, run_hook
from robo_orchard_lab.testing.fixtures import isolated

SRC = Path(__file__).parent.parent / "src"


class Listed(NamedTuple):
    """Reason for a private attribute, and the test of the code without the attribute."""

    reason: str
    fallback: str


PRIVATE = {
    "_foreach_copy_": Listed(
        "torch has no public multi-tensor copy", "test_lists_of_tensors_need_no_fused_kernel"
    ),
    "_foreach_mul_": Listed(
        "torch has no public multi-tensor product", "test_lists_of_tensors_need_no_fused_kernel"
    ),
    "_foreach_norm": Listed(
        "get_total_norm takes 9 us longer for 4 gradients",
        "test_a_norm_equals_that_of_torch",
    ),
    "_get_default_store": Listed(
        "torch 2.8 has no ProcessGroup.get_group_store", "test_a_torch_without_a_store_is_refused"
    ),
    "_hub_mixin_config": Listed(
        "huggingface_hub keeps a model's arguments nowhere else",
        "test_a_hub_model_without_its_arguments_is_reported",
    ),
    "_orig_mod": Listed(
        "torch.compile puts the name into every state_dict",
        "test_a_model_without_the_wrapper_of_compile_is_itself",
    ),
    "_profiler_enabled": Listed(
        "torch has no public test for a running profiler", "test_profiling_needs_no_private_test"
    ),
    "_python_dispatch": Listed(
        "torch documents TorchDispatchMode in this module only",
        "test_counting_reads_names_the_missing_mode",
    ),
    "_reductions": Listed(
        "torchmetrics shows the reduction of a state nowhere else",
        "test_metrics_without_reductions_work_until_they_are_merged",
    ),
    "_shared_state": Listed(
        "Accelerate has no public way to set its states aside",
        "test_isolation_names_the_missing_state",
    ),
    "_update_count": Listed(
        "torchmetrics' update_count can't be set", "test_updates_before_a_resume_are_counted"
    ),
    "__pydantic_decorators__": Listed(
        "pydantic lists the serializers of a class nowhere else",
        "test_configs_are_saved_without_the_list_of_serializers",
    ),
    "__pydantic_generic_metadata__": Listed(
        "pydantic has no function for the arguments of a generic class",
        "test_parameters_of_generic_configs_are_found_as_in_typing",
    ),
    "from_address": Listed(
        "reading NumPy's state takes 55 us for each batch",
        "test_a_cached_gaussian_survives_another_layout_of_memory",
    ),
}

# Documented names with a leading underscore.
DOCUMENTED = {
    "_asdict": "collections.namedtuple",
    "_exit": "os",
    "_fields": "collections.namedtuple",
    "__array__": "NumPy's protocol",
    "__dlpack__": "protocol of the array API",
}

# Functions that may read an attribute by its name.
READERS = {"getattr", "hasattr", "setattr", "delattr", "attrgetter", "get", "pop"}

TEXT = re.compile(r"_[a-z]\w*|__pydantic\w+")
NAME = re.compile(r"_[a-z]\w*|__[a-z]\w*__")

# Bytecode and suspended frames, which change with each release of Python.
FORBIDDEN = re.compile(r"(co_(?!filename$|firstlineno$|qualname$)|gi_|cr_|ag_)\w+")

_PYTHON: list[Any] = [
    object,
    type,
    types.FunctionType,
    types.ModuleType,
    types.MethodType,
    BaseException,
]
_PYTHON += [str, list, dict, tuple, property, TypeError, typing.TypeVar, typing.Annotated[int, 0]]
PYTHONS_OWN = {
    name for value in [*_PYTHON, builtins, sys] for name in dir(value) if name[:2] == "__"
}
PYTHONS_OWN |= {
    *("__post_init__", "__slots__", "__wrapped__", "__abstractmethods__", "__value__"),
    *("__class_getitem__", "__getitems__", "__bound__", "__enter__", "__exit__", "__members__"),
    *("__file__", "__future__", "__notes__", "__version__"),
}


def private_names(tree: ast.AST) -> Iterator[str]:
    """Yield the private names that a module reads: attributes, imports and texts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            if not (node.module or "").startswith("robo_orchard"):
                yield from (node.module or "").split(".")
                yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in READERS:
            yield from texts_in(*node.args)
        elif isinstance(node, ast.Assign):
            yield from texts_in(node.value)
        elif isinstance(node, ast.Subscript):
            yield from texts_in(node.slice)


def texts_in(*nodes: ast.expr) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Constant) and TEXT.fullmatch(str(node.value)):
            yield str(node.value)


def own_names(tree: ast.AST) -> Iterator[str]:
    """Yield the private names that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__slots__":
            yield from ast.literal_eval(node.value)


def imported_files(tree: ast.AST) -> Iterator[Path]:
    """Yield the project's modules from which a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            path = SRC.joinpath(*node.module.split("."))
            yield from (p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists())


def found_names() -> dict[str, set[str]]:
    """Return the files that read each private name which no module of the project defines.

    A name is the project's own if the file, or a file from which it imports, defines the name.
    """
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in SRC.rglob("*.py")}
    own = {file: set(own_names(tree)) for file, tree in trees.items()}
    found: dict[str, set[str]] = {}
    for file, tree in trees.items():
        known = own[file].union(*(own[other] for other in imported_files(tree)))
        for name in set(private_names(tree)) - known - PYTHONS_OWN:
            if name == "from_address" or NAME.fullmatch(name) or FORBIDDEN.fullmatch(name):
                found.setdefault(name, set()).add(str(file.relative_to(SRC)))
    return found


def test_every_private_attribute_of_other_packages_is_listed() -> None:
    """The source reads the listed private names, no others, and all of them."""
    found = found_names()
    unlisted = {name: files for name, files in found.items() if name not in {*PRIVATE, *DOCUMENTED}}
    assert unlisted == {}, "use a public name, or list it with a reason and a tested fallback"
    assert {*PRIVATE, *DOCUMENTED} - {*found} == set(), "no longer used; remove it from the list"


def test_every_private_attribute_has_a_tested_fallback() -> None:
    """Each listed name has a reason, and a test of the code without the name."""
    assert all(
        listed.reason and callable(globals()[listed.fallback]) for listed in PRIVATE.values()
    )


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._private()",
        "def f(model):\n    return getattr(model, '_private', None)",
        "from torch._private import name",
        "from torch import _private",
        "import torch._private.name",
        "def f(x):\n    return vars(x).get('_private')",
        "class A:\n    def f(self):\n        return self.model._private",
    ],
)
def test_the_search_finds_each_kind_of_access(source: str) -> None:
    """Attributes, imports and names in texts are found."""
    tree = ast.parse(source)
    assert "_private" in {*private_names(tree)} - {*own_names(tree)}


# --- fallbacks ---------------------------------------------------------------------------------


def test_lists_of_tensors_need_no_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and copies of lists are equal without torch's fused kernels."""
    given = [torch.rand(3), torch.rand(2, 2)]
    factor = torch.tensor(0.3)

    def results() -> list[torch.Tensor]:
        multiplied = [tensor.clone() for tensor in given]
        multiply_all(multiplied, factor)
        copied = [torch.empty_like(tensor, dtype=torch.float64) for tensor in given]
        copy_all(copied, given)
        return [*multiplied, *copied]

    fused = results()
    monkeypatch.delattr(torch, "_foreach_mul_")
    monkeypatch.delattr(torch, "_foreach_copy_")
    assert all(map(torch.equal, results(), fused))
    assert torch.equal(fused[0], given[0] * factor)
    assert torch.equal(fused[3], given[1].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_equals_that_of_torch(dtype: torch.dtype) -> None:
    """The norm is torch's, by the fused kernel and without it, as for mixed dtypes."""
    gradients = [torch.rand(3), torch.rand(2, 2, dtype=dtype)]
    assert torch.equal(total_norm(gradients, 2.0), torch.nn.utils.get_total_norm(gradients, 2.0))


def test_a_torch_without_a_store_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a way to the process group's store, a job of several processes is refused."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(dist.ProcessGroup, "get_group_store", raising=False)
            patch.delattr(dist.distributed_c10d, "_get_default_store")
            with pytest.raises(PipelineStateError, match=r"get_group_store.*install torch 2.8"):
                JobStore.of_job()
        assert JobStore.of_job().beats([0]) == [(0, 0)]
    finally:
        dist.destroy_process_group()


class Hub(torch.nn.Module, PyTorchModelHubMixin):
    """Model with its arguments in a private attribute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, 1)


def test_a_hub_model_without_its_arguments_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model of the Hub whose arguments can't be found is saved with a warning."""
    model = Hub(width=3)
    assert config_json(model, "SaveModel") == '{\n  "width": 3\n}\n'
    del model.__dict__["_hub_mixin_config"]
    for kind in Hub.__mro__:
        if "_hub_mixin_config" in vars(kind):
            monkeypatch.delattr(kind, "_hub_mixin_config")
    with caplog.at_level(logging.WARNING):
        assert config_json(model, "SaveModel") is None
    assert "set model.config" in caplog.text


def test_a_model_without_the_wrapper_of_compile_is_itself() -> None:
    """A module is taken out of the wrapper of torch.compile; another one is returned."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    assert uncompiled(model) is model
    assert uncompiled(torch.compile(model, backend="eager")) is model  # type: ignore[arg-type]  # a module


def test_profiling_needs_no_private_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch's test for a running profiler, a trace is written nevertheless."""
    monkeypatch.delattr(torch.autograd, "_profiler_enabled")
    run_hook(TorchProfilerHookConfig(folder=str(tmp_path), start_step=1, steps=1), steps=3)
    assert [*tmp_path.rglob("*.json*")]


def test_counting_reads_names_the_missing_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TorchDispatchMode, counting is refused, and all else of the test kit works."""
    monkeypatch.setitem(sys.modules, "torch.utils._python_dispatch", None)
    with pytest.raises(RuntimeError, match=r"TorchDispatchMode.*install torch"), count_host_reads():
        pass


def test_isolation_names_the_missing_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Accelerate's shared states, a separate run is refused."""
    monkeypatch.delattr(GradientState, "_shared_state")
    with pytest.raises(RuntimeError, match=r"_shared_state.*install accelerate"), isolated(0):
        pass


def test_metrics_without_reductions_work_until_they_are_merged() -> None:
    """Without the declared reductions, a metric has its value, and merging is an error."""
    metric = MeanSquaredError()
    del metric.__dict__["_reductions"]
    metrics = TorchMetrics({"mse": metric})
    metrics.update(torch.tensor([1.0]), torch.tensor([3.0]))
    first = metrics.pop_states()
    assert resolve(metrics.snapshot(first)) == {"mse": 4.0}
    metrics.update(torch.tensor([1.0]), torch.tensor([1.0]))
    with pytest.raises(MetricValueError, match=r"_reductions.*install torchmetrics"):
        resolve(metrics.snapshot(metrics.merge([first, metrics.pop_states()])))


class CountedElsewhereMSE(MeanSquaredError):  # noqa: N818 - a metric
    """Metric whose count of updates can't be set by the known attribute."""

    @property
    def update_count(self) -> int:
        return int(self.__dict__.get("counted", 0))

    @property
    def update_called(self) -> bool:
        return self.update_count > 0

    def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
        self.__dict__["counted"] = self.update_count + 1
        super().update(preds, target)

    def reset(self) -> None:
        self.__dict__["counted"] = 0
        super().reset()


def test_updates_before_a_resume_are_counted() -> None:
    """A metric whose count can't be restored resumes with its state, its count and its value."""
    metrics = TorchMetrics({"mse": CountedElsewhereMSE()})
    metrics.update(torch.tensor([1.0]), torch.tensor([3.0]))
    resumed = TorchMetrics({"mse": CountedElsewhereMSE()})
    resumed.load_state_dict(metrics.state_dict())
    resumed.update(torch.tensor([1.0]), torch.tensor([1.0]))
    assert resumed.state_dict()["metrics"][0]["updates"] == 2
    states = resumed.pop_states()
    assert states[0].updates == 2
    assert resolve(resumed.snapshot(states)) == {"mse": 2.0}
    assert resumed.pop_states()[0].updates == 0


class Serialized(Config):
    """Config with a serializer of its own."""

    value: int = 3

    @field_serializer("value")
    def _double(self, value: int) -> int:
        return value


def test_configs_are_saved_without_the_list_of_serializers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A config is saved by the types of its fields if pydantic does not list its serializers."""
    saved = Serialized(value=4).to_dict()
    monkeypatch.setattr(Serialized, "__pydantic_decorators__", None)
    assert Serialized(value=4).to_dict() == saved


def test_parameters_of_generic_configs_are_found_as_in_typing() -> None:
    """A class that has the attributes of typing instead of pydantic's has the same parameters."""
    item = typing.TypeVar("item")

    class Given(BaseModel, typing.Generic[item]):
        value: item

    class Later:
        __origin__, __args__, __parameters__ = Given, (int,), ()

    assert parametrization(Given[int]) == parametrization(Later) == (Given, (int,), ())
    assert parametrization(Given) == (None, (), (item,))
    assert parametrization(int) == (None, (), ())


def test_a_cached_gaussian_survives_another_layout_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The public state is read every time if NumPy's memory differs from it."""
    expected = np.random.RandomState(0).normal(size=4).tolist()
    monkeypatch.setattr(fetching, "c_uint32", ctypes.c_uint16)
    np.random.seed(0)
    isolation = RngIsolation()
    found = []
    for _ in range(4):
        with isolation:
            seed_rng(5)
            np.random.normal()
        found.append(np.random.normal())
    assert found == expected
