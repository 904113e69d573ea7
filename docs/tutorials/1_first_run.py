"""
Train, and read the report
==========================

This tutorial trains a small classifier from one file, looks at the curves and the
report of the run, and loads the trained weights into plain PyTorch. It needs no
GPU, no download and no code of your own.

``pip install ".[terminal,metrics]"`` installs the package from a checkout; the
pictures here also need matplotlib.
"""

# %%
# The commands below are those that you type in a terminal. A small function runs
# them here, in a folder of their own, and prints their output.

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("FORCE_COLOR", None)  # plain text, also in a notebook
folder = Path(tempfile.mkdtemp(prefix="first-run-"))


def run(command: str) -> None:
    """Run a `robo-orchard-lab` command in the folder, and print its output."""
    print(f"$ {command}")
    words = [sys.executable, "-m", "robo_orchard_lab", *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


run("robo-orchard-lab config init")

# %%
# An experiment is a file
# -----------------------
# ``config init`` wrote a complete, commented experiment. Without its comments:

for line in (folder / "experiment.yaml").read_text().splitlines():
    if content := line.split("#")[0].rstrip():
        print(content)

# %%
# Every component is a class with its arguments: a model of this package (``MLP``),
# an optimizer of torch (``torch.optim:AdamW``), hooks that log, evaluate and save.
# The data are points on three arms of a spiral, and the model learns which arm a
# point lies on.
#
# Train
# -----
# ``train`` checks the file, builds the components, and trains. In a terminal, a
# progress bar and a line for each epoch or two appear above this result.

run("robo-orchard-lab train experiment.yaml")

# %%
# All files of the run are in one folder. The checkpoints are safetensors and JSON,
# and ``config.yaml`` has every setting of the run, defaults included.

for path in sorted((folder / "runs/spirals").iterdir()):
    print(path.name + "/" * path.is_dir())

# %%
# Look at the curves
# ------------------
# ``watch`` draws the curves of a run in the terminal, also while the run trains.

run("robo-orchard-lab watch runs/spirals --once --metric val/loss")

# %%
# ``read_metrics`` reads the same numbers for a plot of your own. A record has the
# metrics of one logging point.

import matplotlib.pyplot as plt

from robo_orchard_lab.pipeline.sinks import read_metrics

records = read_metrics(folder / "runs/spirals/metrics.jsonl")
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for name in ("loss/total", "eval/val/loss"):
    values = [value for record in records for value in record.values]
    points = [(value.step, value.value) for value in values if value.name == name]
    axes.plot(*zip(*points, strict=True), label=name)
axes.set(xlabel="step", ylabel="loss", yscale="log")
axes.legend()
plt.show()

# %%
# Read the report
# ---------------
# The run also wrote ``report.html``: one file that you can open in a browser, send to
# a colleague, or print. Here it is, as it is. Drag in a chart to zoom, click a name to
# hide its curve.

import html
import re


class Page:
    """A page to show in a notebook and in this tutorial."""

    def __init__(self, path: Path) -> None:
        text = path.read_text("utf-8")
        # This page is public: do not name the machine that made it.
        text = re.sub(r'"(command|folder|host)":"[^"]*"', r'"\1":"-"', text)
        self.text = re.sub(r'"[^"]*/(robo_orchard_lab/[^"]*)"', r'"\1"', text)

    def _repr_html_(self) -> str:
        return (
            f'<iframe title="Report of the run" srcdoc="{html.escape(self.text)}" '
            'style="width: 100%; height: 36rem; border: 1px solid gray"></iframe>'
        )


Page(folder / "runs/spirals/report.html")

# %%
# Use the weights
# ---------------
# ``evaluate`` measures the saved weights on the evaluation sets of the file.

run("robo-orchard-lab evaluate runs/spirals")

# %%
# ``checkpoint export`` writes them to one file, which plain PyTorch loads.

run("robo-orchard-lab checkpoint export runs/spirals")

import torch
from safetensors.torch import load_file

from robo_orchard_lab.experiment.samples import MLP, Spirals

model = MLP(inputs=2, hidden=[64, 64], outputs=3)
print(model.load_state_dict(load_file(folder / "model.safetensors")))

# %%
# The picture shows the arm that the model predicts for each place of the plane, and
# points that it has not seen in training.

points = Spirals(size=600, seed=2)
x, y = torch.meshgrid(*[torch.linspace(-1.2, 1.2, 200)] * 2, indexing="xy")
with torch.no_grad():
    arms = model(torch.stack([x, y], dim=-1)).argmax(dim=-1)
    right = (model(points.points).argmax(dim=-1) == points.labels).float().mean()

figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
axes.imshow(arms, extent=(-1.2, 1.2, -1.2, 1.2), origin="lower", cmap="Pastel1", vmax=8)
axes.scatter(*points.points.T, c=points.labels, s=8, cmap="Set1", vmax=8)
axes.set_title(f"{right:.1%} of 600 new points are right")
plt.show()

# %%
# Next
# ----
# - ``--trainer.max_epoch 40`` on the command line changes a field of the file:
#   :doc:`2_experiment_files`.
# - ``train`` again, after an interruption or Ctrl-C, continues the run exactly:
#   :doc:`5_kill_and_resume`.
# - ``robo-orchard-lab view runs`` serves the reports of all runs to your browser:
#   :doc:`/how_to/report`.
