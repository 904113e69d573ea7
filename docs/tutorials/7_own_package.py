"""
Your own model, data and hooks in a package
===========================================

A team's code lives in a package of its own: a model, a dataset, hooks, and tests. This
tutorial writes such a package, tests it, names its classes in an experiment file, and
trains from the command line. Nothing is registered anywhere: a file names a class by
its module.
"""

# %%
# A model and a dataset
# ---------------------
# Both are plain PyTorch. Constructor arguments become fields of experiment files, and
# their annotations are checked, so write them down.

import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp(prefix="package-"))


def write(name: str, content: str) -> None:
    """Write a file of the project."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content.lstrip())


write("my_team/__init__.py", '"""Models, data and hooks of my team."""\n')
write(
    "my_team/parts.py",
    '''
"""Model and data: which ring does a point lie in?"""

import torch


class Rings(torch.utils.data.Dataset):
    """Points in the plane, labelled with their ring around the origin."""

    def __init__(self, size: int, rings: int = 3, seed: int = 0) -> None:
        if rings < 2:
            raise ValueError(f"rings must be >= 2, got {rings}")
        generator = torch.Generator().manual_seed(seed)
        self.points = torch.rand(size, 2, generator=generator) * 2 - 1
        self.labels = (self.points.norm(dim=1) / 2**0.5 * rings).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.points[index], int(self.labels[index])


class RingNet(torch.nn.Module):
    """Two layers on the coordinates and their squares."""

    def __init__(self, rings: int = 3, width: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, width),
            torch.nn.ReLU(),
            torch.nn.Dropout(dropout),
            torch.nn.Linear(width, rings),
        )

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([points, points.square()], dim=-1))
''',
)

# %%
# A hook
# ------
# The first hook is small: constructor arguments are its settings. The second one
# watches the loss, and counts steps whose loss is much higher than the running mean.
# Its configuration has ranges; it declares what it reads and publishes, and saves its
# state, as in :doc:`3_custom_hooks`.

write(
    "my_team/hooks.py",
    '''
"""Hooks of my team."""

import torch
from pydantic import Field

from robo_orchard_lab.pipeline.hooks.mixin import (
    HookContext,
    PipelineHookArgs,
    PipelineHooks,
    PipelineHooksConfig,
)


class WeightNorm(PipelineHooks):
    """Publish the norm of all weights."""

    def __init__(self, every: str = "1 epoch") -> None:
        super().__init__()
        self.on_epoch.after(when=every)(self.publish)

    def publish(self, args: PipelineHookArgs) -> None:
        squares = [weight.detach().square().sum() for weight in args.model.parameters()]
        args.metrics.publish("weight_norm", sum(squares).sqrt())


class LossSpikes(PipelineHooks):
    """Publish the number of steps with a loss far above the running mean."""

    keeps_trajectory = True  # it only observes: a run may resume with other settings
    reads = ("loss",)
    changes = ("metrics",)
    requests = ()
    published_metrics = ("loss/spikes",)

    def __init__(self, cfg: "LossSpikesConfig") -> None:
        super().__init__()
        self.cfg = cfg
        self.mean = torch.tensor(float("nan"))
        self.register_hook("on_step", HookContext.from_callable(after=self.watch))

    def watch(self, args: PipelineHookArgs) -> None:
        loss = args.loss.float()
        mean = torch.where(self.mean.isnan(), loss, self.mean.to(loss.device))
        spike = (loss > self.cfg.factor * mean).float()
        args.metrics.publish("loss/spikes", spike, reduce="sum")
        self.mean = mean.lerp(loss, 1 - self.cfg.decay)

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


class LossSpikesConfig(PipelineHooksConfig[LossSpikes]):
    class_type: type[LossSpikes] = LossSpikes
    factor: float = Field(default=3.0, gt=1, description="Times the mean, for a spike.")
    decay: float = Field(default=0.9, ge=0, lt=1, description="Of the mean, per step.")
''',
)

# %%
# Tests
# -----
# The test kit trains a tiny model for a few steps with the hook. Four sentences say
# what must hold for every hook: it does its work, it resumes, it does not change the
# weights, and it does not wait for the device.

write(
    "tests/test_hooks.py",
    '''
"""The hooks of my team work, resume, and cost nothing."""

from my_team.hooks import LossSpikesConfig
from robo_orchard_lab.testing import (
    assert_no_device_sync,
    assert_state_round_trip,
    assert_weights_unchanged,
    run_hook,
)

CONFIG = LossSpikesConfig(factor=1.01, decay=0.5)


def test_spikes_are_counted():
    """Each step publishes 1 for a spike, else 0; the first step has no mean yet."""
    counts = run_hook(CONFIG, steps=6).metrics["loss/spikes"]
    assert counts[1] == 0
    assert set(counts.values()) == {0, 1}


def test_the_hook_resumes():
    """A stopped and resumed run publishes what an uninterrupted run publishes."""
    assert_state_round_trip(CONFIG)


def test_the_hook_observes_only():
    """The weights are those of a run without the hook."""
    assert_weights_unchanged(CONFIG)


def test_the_hook_does_not_wait_for_the_device():
    """No step reads a value from the device."""
    assert_no_device_sync(CONFIG)
''',
)

# %%
# An experiment
# -------------
# The file names classes as ``module:Class``. ``[tool.robo_orchard_lab]`` in your
# ``pyproject.toml`` says that files in this project may name ``my_team``; a file of a
# stranger can't say so itself.

write(
    "pyproject.toml",
    """
[project]
name = "my-team"
version = "0.1"

[tool.robo_orchard_lab]
trust = ["my_team"]

[tool.pytest.ini_options]
pythonpath = ["."]
""",
)
write(
    "rings.yaml",
    """
name: rings
model: {class_type: my_team.parts:RingNet, rings: 3, width: 32, dropout: 0.1}
data:
  train:
    dataset: {class_type: my_team.parts:Rings, size: 600}
    batch_size: 30
    shuffle: true
  evaluation:
    val:
      dataset: {class_type: my_team.parts:Rings, size: 300, seed: 1}
      batch_size: 300
batch_processor:
  class_type: SupervisedProcessor
  loss: {class_type: torch.nn:CrossEntropyLoss}
optimizer: {class_type: torch.optim:AdamW, lr: 0.01}
hooks:
  spikes: {class_type: my_team.hooks:LossSpikes, factor: 2.5}
  norm: {class_type: my_team.hooks:WeightNorm, every: 5 epochs}
  log:
    class_type: MetricsLogger
    every: 1 epoch
    sinks: [{class_type: JsonLinesSink, path: metrics.jsonl}]
  val:
    class_type: ValidationHook
    metrics:
      accuracy:
        class_type: torchmetrics.classification:MulticlassAccuracy
        num_classes: 3
trainer: {max_epoch: 15}
""",
)
for path in sorted(folder.rglob("*.*")):
    print(path.relative_to(folder))

# %%
# Test, check, train
# ------------------
# Run the tests first, then check the file.

import os
import shlex
import subprocess
import sys

os.environ.pop("FORCE_COLOR", None)  # plain text, also in a notebook


def run(command: str, exit_code: int = 0) -> None:
    """Run a command in the project, and print its output."""
    print(f"$ {command}")
    program, *words = shlex.split(command)
    module = {"robo-orchard-lab": "robo_orchard_lab", "pytest": "pytest"}[program]
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == exit_code, done.stdout + done.stderr
    print(done.stdout or done.stderr)


run("pytest -v --no-header -p no:cacheprovider")

# %%
# The arguments of your classes are checked like those of the package. Two mistakes:

run(
    "robo-orchard-lab config check rings.yaml --model.with 64 --hooks.spikes.factor 1",
    exit_code=2,
)

# %%
# ``hooks plan`` shows your hook in its place, with its trigger and source.

run("robo-orchard-lab hooks plan rings.yaml")

# %%
run("robo-orchard-lab train rings.yaml")

# %%
# The metrics of your hooks are next to those of the package, in ``metrics.jsonl``, in
# the report and in trackers:

import matplotlib.pyplot as plt

from robo_orchard_lab.pipeline.sinks import read_metrics

records = read_metrics(folder / "runs/rings/metrics.jsonl")
values = [value for record in records for value in record.values]
names = ("eval/val/accuracy", "weight_norm", "loss/spikes")
_, plots = plt.subplots(1, len(names), figsize=(8, 2.2), layout="constrained")
for axes, name in zip(plots, names, strict=True):
    points = [(value.step, value.value) for value in values if value.name == name]
    axes.plot(*zip(*points, strict=True), ".-")
    axes.set(title=name, xlabel="step")
plt.show()

# %%
# Prove that the package resumes
# ------------------------------
# ``prove-resume`` runs the training in processes that stop and continue, and compares
# every step. Run it when your code has state: a dataset, a sampler, a hook.

run("robo-orchard-lab prove-resume rings.yaml --steps 30 --stops 1")

# %%
# Next
# ----
# ``pip install -e .`` makes the package importable everywhere; without it, modules are
# imported from the current folder, as here. The schema of files with your classes, for
# completion in an editor: ``robo-orchard-lab schema --trust my_team.hooks:LossSpikes``.
#
# :doc:`/how_to/hooks` has the rules of hooks, :doc:`/how_to/experiments` those of
# files.
