"""
Kill a run, resume it, prove it
===============================

Machines fail, jobs are preempted, and someone trips over a cable. This tutorial kills
a training with SIGKILL, which no program can catch, starts it again, and compares the
result with a run that nobody touched: the weights are equal, bit for bit. In the end,
``prove_resume`` checks the same for any training, step by step.
"""

# %%
# A training that is hard to resume
# ---------------------------------
# Processes are the point here, so the training is a script. It shuffles, adds noise
# to each sample, uses dropout and momentum, and changes the learning rate: all of it is
# state that a resume has to restore. Two arguments make it resumable:
# ``SaveCheckpointConfig`` saves every 50 steps, and ``resume_from="auto"`` continues
# from the newest intact checkpoint, or begins if there is none.

import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp(prefix="resume-"))
(folder / "train.py").write_text("""
import sys
import time

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from robo_orchard_lab.pipeline import (
    HookBasedTrainer, PipelineHooks, SupervisedProcessor
)
from robo_orchard_lab.pipeline.hooks import (
    LossTrackerConfig, MetricsLoggerConfig, SaveCheckpointConfig
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig


class NoisySine(torch.utils.data.Dataset):
    def __len__(self):
        return 320

    def __getitem__(self, index):
        x = torch.rand(1) * 6  # another place in every epoch
        return x, x.sin() + 0.05 * torch.randn(1)


def build(run_folder, resume_from="auto", hooks=()):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(1, 64),
        torch.nn.Tanh(),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(64, 1),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    progress = PipelineHooks("progress")
    progress.on_step.after(when="20 steps")(
        lambda args: print("step", args.global_step_id + 1, flush=True)
    )
    return HookBasedTrainer(
        accelerator=Accelerator(cpu=True),
        model=model,
        dataloader=torch.utils.data.DataLoader(NoisySine(), batch_size=8, shuffle=True),
        batch_processor=SupervisedProcessor(torch.nn.MSELoss()),
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200),
        hooks=[
            *hooks,
            progress,
            SaveCheckpointConfig(every="50 steps", keep_last=2),
            MetricsLoggerConfig(
                every="20 steps",
                sinks=[JsonLinesSinkConfig(path=f"{run_folder}/metrics.jsonl")],
            ),
            LossTrackerConfig(),
        ],
        max_epoch=5,  # of 40 steps
        run_folder=run_folder,
        resume_from=resume_from,
    )


if __name__ == "__main__":
    pause = PipelineHooks("pause")
    if "slowly" in sys.argv:  # leaves time to kill the process
        pause.on_step.after(lambda args: time.sleep(0.03))
    trainer = build(sys.argv[1], hooks=[pause])
    print("begin at step", trainer.progress.global_step_id)
    trainer()
    save_file(trainer.model.state_dict(), sys.argv[1] + "/model.safetensors")
    print("done at step", trainer.progress.global_step_id)
""")

# %%
# An uninterrupted run
# --------------------

import shlex
import subprocess
import sys


def start(command: str) -> subprocess.Popen:
    """Start a command in the folder, as in a terminal."""
    print(f"$ {command}")
    program, *words = shlex.split(command)
    module = {"robo-orchard-lab": ["-m", "robo_orchard_lab"], "python": []}[program]
    return subprocess.Popen(
        [sys.executable, *module, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(command: str, exit_code: int = 0) -> None:
    """Run a command in the folder, and print its output."""
    process = start(command)
    output, errors = process.communicate()
    assert process.returncode == exit_code, errors
    print(output.replace(f"{folder}/", ""))


run("python train.py straight")

# %%
# Kill it
# -------
# Now the same training in another folder. When it reports step 120, the process gets
# SIGKILL: it has no chance to save or to clean up. ``-9`` is the signal that ended it.

process = start("python train.py killed slowly")
for line in process.stdout:
    print(line, end="")
    if line == "step 120\n":
        process.kill()
print("exit code", process.wait())

# %%
# The folder tells the truth about the run: it is down, and there is a checkpoint.

run("robo-orchard-lab runs .")
run("robo-orchard-lab checkpoint list killed")

# %%
# Resume it
# ---------
# The command is the same, here at full speed. The run continues after the last
# checkpoint.

run("python train.py killed")

# %%
# Compare
# -------
# Both runs took 200 steps, one of them in two processes. Every weight is equal, in
# every bit. So is the file of metrics: no record is missing, and none is there twice.

import torch
from safetensors.torch import load_file

straight = load_file(folder / "straight/model.safetensors")
killed = load_file(folder / "killed/model.safetensors")
for name in straight:
    print(name, "equal:", torch.equal(straight[name], killed[name]))

metrics = [
    (folder / name / "metrics.jsonl").read_bytes() for name in ("straight", "killed")
]
print("metrics equal:", metrics[0] == metrics[1])

# %%
# The curves lie on each other, also where the second run was killed and continued:

import matplotlib.pyplot as plt

from robo_orchard_lab.pipeline.sinks import read_metrics

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for name, style in (("straight", "C0-"), ("killed", "C1--")):
    losses = [
        (value.step, value.value)
        for record in read_metrics(folder / name / "metrics.jsonl")
        for value in record.values
        if value.name == "loss/total"
    ]
    axes.plot(*zip(*losses, strict=True), style, linewidth=3, label=name)
axes.axvline(100, color="gray", linestyle=":", label="checkpoint")
axes.axvline(120, color="black", linestyle=":", label="SIGKILL")
axes.set(xlabel="step", ylabel="loss", yscale="log")
axes.legend()
plt.show()

# %%
# A damaged checkpoint
# --------------------
# A checkpoint has a digest of each of its files. Here one byte of the newest one
# changes, as by a faulty disk. The damage is found before anything is loaded:

weights = folder / "killed/checkpoints/step_00000200/model.safetensors"
content = bytearray(weights.read_bytes())
content[-1] ^= 1
weights.write_bytes(content)
run("robo-orchard-lab checkpoint verify killed", exit_code=1)

# %%
# A start falls back to the newest intact checkpoint, and the last 50 steps are trained
# again, to the same weights.

run("python train.py killed")
again = load_file(folder / "killed/model.safetensors")
print("equal:", all(torch.equal(straight[name], again[name]) for name in straight))

# %%
# Prove it for your own training
# ------------------------------
# Equal weights at the end are good, but say nothing of the way. ``prove_resume`` runs
# a training uninterrupted, and again with processes that are killed at random moments.
# It compares samples, losses, gradients, weights, optimizer, LR scheduler, random
# number generators and hooks at every step.

(folder / "prove.py").write_text("""
from robo_orchard_lab.testing import prove_resume

if __name__ == "__main__":  # multiprocessing starts processes
    print(prove_resume("train.py:build", steps=60, stops=[20, 45], kill=True))
""")
run("python prove.py")

# %%
# A training that does not resume
# -------------------------------
# This one has a mistake: a hook adds noise that decreases with a counter, and the
# counter is not saved. Such a run trains well, and resumes without any error; only
# its result is a different one. The proof names the first step and value that differ,
# and the attribute that caused it.

(folder / "broken.py").write_text("""
import torch
import train

from robo_orchard_lab.pipeline import PipelineHooks
from robo_orchard_lab.testing import prove_resume


class Exploration(PipelineHooks):
    def __init__(self):
        super().__init__()
        self.scale = 1.0  # missing: state_dict and load_state_dict
        self.on_batch.before(self.add_noise)

    def add_noise(self, args):
        self.scale *= 0.9
        x, y = args.batch
        args.batch = x + self.scale * torch.randn_like(x), y


def build(run_folder, resume_from):
    return train.build(run_folder, resume_from, hooks=[Exploration()])


if __name__ == "__main__":
    print(prove_resume("broken.py:build", steps=20, stops=[10]))
""")
run("python broken.py")

# %%
# Next
# ----
# - :doc:`/how_to/resume` has the rules: other workers, other batch sizes, another
#   number of processes.
# - :doc:`7_own_package` proves an experiment file, with ``prove-resume``.
