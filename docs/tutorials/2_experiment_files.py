"""
Describe an experiment in a file
================================

An experiment is a file: model, data, optimizer, hooks and limits, each with its
arguments. A file can be checked without training, compared with another one, changed
from the command line, and loaded from a stranger without running the stranger's code.
This tutorial writes a file with mistakes in it, corrects them, writes a variant, trains
both, and compares them.
"""

# %%
# Write a file
# ------------
# A component is a mapping with ``class_type`` and the arguments of the class. Short
# names such as ``MLP`` are classes of this package; others are ``module:Class``. This
# first draft has two spelling mistakes.

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp(prefix="experiments-"))
draft = """\
name: spirals
model: {class_type: MLP, inputs: 2, hidden: [32], outputs: 3}
data:
  train:                      # arguments of torch's DataLoader
    dataset: {class_type: Spirals, size: 600}
    batch_size: 50
    shuffle: true
  evaluation:                 # named sets, for the ValidationHook
    val:
      dataset: {class_type: Spirals, size: 300, seed: 1}
      batch_size: 300
batch_processor:
  class_type: SupervisedProcessor
  loss: {class_type: torch.nn:CrossEntropyLoss}
optimizer: {class_type: torch.optim:SGD, lr: 0.5, momentun: 0.9}
hooks:                        # by name, the outermost first
  log:
    class_type: MetricsLogger
    every: 1 epoch
    sinks: [{class_type: JsonLinesSink, path: metrics.jsonl}]
  loss: {class_type: LossTracker}
  val: {class_type: ValidationHook, every: 1 epoch}
trainer: {max_epochs: 40}
"""
(folder / "spirals.yaml").write_text(draft)

# %%
# Check it
# --------
# ``config check`` compares every name, type and value with the constructors of the
# classes, those of torch included. Each mistake is one line: the place, what was
# expected, what was found, and the nearest correct spelling.


def run(command: str, *words: str, exit_code: int = 0, **variables: str) -> None:
    """Run a `robo-orchard-lab` command in the folder, and print its output.

    Args:
        words: print only lines with one of these words, if there are any.
        exit_code: expected result; 2 is an invalid file.
        variables: of the environment.
    """
    print("$", *(f"{name}={value}" for name, value in variables.items()), command)
    done = subprocess.run(
        [sys.executable, "-m", "robo_orchard_lab", *shlex.split(command)[1:]],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == exit_code, done.stderr
    for line in (done.stdout or done.stderr).splitlines():
        if not words or any(word in line for word in words):
            print(line)
    print()


run("robo-orchard-lab config check spirals.yaml", exit_code=2)

# %%
corrected = draft.replace("momentun", "momentum").replace("max_epochs", "max_epoch")
(folder / "spirals.yaml").write_text(corrected)
run("robo-orchard-lab config check spirals.yaml")

# %%
# A check does not run the code. ``--debug-fast`` does: two steps of training, an
# evaluation, a save and a resume, in a temporary folder.

run("robo-orchard-lab train spirals.yaml --debug-fast")

# %%
# Override fields
# ---------------
# Each field is an option of the command line, under its path in the file. The command
# line overrides the environment, which overrides the file, which overrides the
# defaults. ``config show --origins`` names the source of each value.

run(
    "robo-orchard-lab config show spirals.yaml --origins --optimizer.lr 0.2",
    *("FIELD", "optimizer.", "max_epoch"),
    ROBO_ORCHARD_LAB__TRAINER__MAX_EPOCH="60",
)

# %%
# Write a variant
# ---------------
# A file with a ``base`` contains only what differs. A mapping is merged with that of
# the base, ``null`` removes a hook, and another class replaces the component.

(folder / "wide.yaml").write_text("""\
base: spirals.yaml
name: wide
model: {hidden: [128]}
optimizer: {class_type: torch.optim:AdamW, lr: 0.02}
hooks:
  clip: {class_type: GradientClippingHook, max_norm: 1.0}
""")
run("robo-orchard-lab config diff spirals.yaml wide.yaml")

# %%
# The last column is about runs that have begun: a *harmless* change leaves the weights
# as they are, *trajectory* needs your permission, and *impossible* a new run.
#
# ``train --dry-run`` builds everything, computes one batch, and describes the run.

run("robo-orchard-lab train wide.yaml --dry-run")

# %%
# Train and compare
# -----------------
# Both runs get a folder under ``runs``, with the complete configuration of the run.
# ``runs`` lists them with their best evaluation.

run("robo-orchard-lab train spirals.yaml")
run("robo-orchard-lab train wide.yaml")
run("robo-orchard-lab runs")

# %%
# The metrics of a run are lines of JSON. With SGD at this learning rate the loss jumps;
# the loss of the variant decreases steadily.

import matplotlib.pyplot as plt

from robo_orchard_lab.pipeline.sinks import read_metrics

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for name in ("spirals", "wide"):
    records = read_metrics(folder / "runs" / name / "metrics.jsonl")
    losses = [
        (value.step, value.value)
        for record in records
        for value in record.values
        if value.name == "eval/val/loss"
    ]
    axes.plot(*zip(*losses, strict=True), label=name)
axes.set(xlabel="step", ylabel="eval/val/loss", yscale="log")
axes.legend()
plt.show()

# %%
# ``report`` with several runs writes one page with a table of the runs, the fields that
# differ, and the curves in common charts.

run("robo-orchard-lab report runs/spirals runs/wide")

# %%
# Use a file in Python
# --------------------
# The same file is a typed object. ``replace`` returns a changed copy, and ``build``
# makes the objects of a training script: model, optimizer, hooks, trainer.

from robo_orchard_lab.experiment import ExperimentConfig

experiment = ExperimentConfig.load(folder / "spirals.yaml")
print(type(experiment.optimizer).__name__, experiment.optimizer.lr)

changes = {"trainer.max_epoch": 5, "checkpoint": None, "resume": "never"}
short = experiment.replace(**changes, run_folder=str(folder / "short"))
built = short.build()
built.trainer()
print(built.trainer.progress)

# %%
# Settings of a script
# --------------------
# For a script that is no experiment file, ``SettingConfig`` gives the same checks to a
# few fields, and makes them options of the script.

import argparse

from pydantic import Field

from robo_orchard_core.utils.cli import SettingConfig, pydantic_from_argparse


class Settings(SettingConfig):
    """Collect demonstrations."""

    episodes: int = Field(default=50, ge=1, description="Number of demonstrations.")
    folder: str = Field(default="data/pick", description="Dataset to create.")


parser = argparse.ArgumentParser(
    prog="collect.py", description="Collect demonstrations."
)
settings = pydantic_from_argparse(Settings, parser, args=["--episodes", "20"])
print(settings)

# %%
# A stranger's file
# -----------------
# A file names code, and code can do anything. Names are therefore resolved in trusted
# packages only: this one, and common classes of torch, torchvision and torchmetrics.
# Anything else is refused before it is imported.

(folder / "strange.yaml").write_text("""\
base: spirals.yaml
model: {func: "os:system", command: "echo I am in"}
""")
run("robo-orchard-lab train strange.yaml", exit_code=2)

# %%
# You trust your own package by name, with ``--trust my_team`` or in your
# ``pyproject.toml``.
#
# Next
# ----
# - :doc:`7_own_package`
# - :doc:`/how_to/experiments` has all rules of files, :doc:`/reference/fields` all
#   fields.
# - :doc:`/how_to/search` finds the best values of fields.
