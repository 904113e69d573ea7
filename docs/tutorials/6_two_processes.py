"""
Train in two processes
======================

A script needs no change for several processes: torchrun starts it once for each, and
the trainer splits the work. This tutorial runs one training in one process and in two,
looks at which process gets which samples, compares the weights, and breaks one of the
processes. It uses CPU cores and the backend gloo; with GPUs the commands are the same.
"""

# %%
# One script for any number of processes
# --------------------------------------
# The batch size is that of one process, so the script divides the 8 samples of a step.
# The hook prints the samples that its process, or *rank*, trains on.

import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp(prefix="processes-"))
(folder / "train.py").write_text("""
import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from robo_orchard_lab.pipeline import (
    HookBasedTrainer, PipelineHooks, SupervisedProcessor
)
from robo_orchard_lab.pipeline.hooks import SaveCheckpointConfig, ValidationHookConfig

run_folder, *options = sys.argv[1:]
accelerator = Accelerator(cpu=True)
rank, ranks = accelerator.process_index, accelerator.num_processes

observe = PipelineHooks("observe")


@observe.on_step.after(when="at steps 1, 2, 3")
def show_samples(args):
    line = f"step {args.step_id}, rank {rank}: samples {args.sample_indices}\\n"
    print(line, end="", flush=True)


@observe.on_step.before(when="at steps 11")
def fail(args):
    if rank == 1 and "fail" in options:
        raise OSError("the disk of rank 1 is gone")


torch.manual_seed(0)
x = torch.linspace(-1, 1, 21).unsqueeze(1)  # 21 samples: steps of 8, 8 and 5
data = TensorDataset(x, x.square())
model = torch.nn.Sequential(
    torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
)
trainer = HookBasedTrainer(
    accelerator=accelerator,
    model=model,
    dataloader=DataLoader(data, batch_size=8 // ranks, shuffle=True),
    batch_processor=SupervisedProcessor(torch.nn.MSELoss()),
    optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
    hooks=[
        observe,
        ValidationHookConfig(every="last")(
            dataloaders={"all": DataLoader(data, batch_size=4)}
        ),
        SaveCheckpointConfig(every="10 epochs"),
    ],
    max_epoch=20,
    run_folder=run_folder,
    resume_from="auto",
)
begun_at = trainer.progress.global_step_id
trainer()
if accelerator.is_main_process:
    weights = accelerator.unwrap_model(model).state_dict()
    save_file(weights, f"{run_folder}/model.safetensors")
    done_at = trainer.progress.global_step_id
    loss = trainer.metrics.latest("eval/all/loss")
    print(f"trained steps {begun_at} to {done_at}, loss {loss:.6f}")
""")

# %%
# In one process
# --------------
# ``python`` starts one process, as usual.

import os
import shlex
import subprocess
import sys

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PROGRAMS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run"],
    "robo-orchard-lab": ["-m", "robo_orchard_lab"],
}


def run(command: str, fails: bool = False) -> list[str]:
    """Run a command in the folder, and print its lines, sorted by step and rank."""
    print(f"$ {command}")
    program, *words = shlex.split(command)
    words = [sys.executable, *PROGRAMS[program], *words]
    done = subprocess.run(
        words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (done.returncode != 0) == fails, done.stderr
    lines = sorted(done.stdout.splitlines())
    print(*lines, sep="\n")
    return lines


lines = run("python train.py runs/one")

# %%
# In two processes
# ----------------
# ``torchrun`` starts two. The first step of one process had the same eight samples as
# the first steps of these two ranks together, in the same order. The last step has 5
# samples, which two ranks can't share equally: each of them is used once, and none is
# repeated to fill up a batch.

lines = run("torchrun --standalone --nproc-per-node 2 train.py runs/two")

# %%
# The samples of each step, colored by rank:

import re

import matplotlib.pyplot as plt

_, axes = plt.subplots(figsize=(7, 2), layout="constrained")
columns = [0, 0, 0]  # samples so far, by step
for line in lines:
    if found := re.match(r"step (\d), rank (\d): samples \[(.*)\]", line):
        step, rank = int(found[1]), int(found[2])
        for sample in found[3].split(", "):
            box = {"boxstyle": "circle", "facecolor": f"C{rank}", "alpha": 0.4}
            axes.text(columns[step], -step, f"{sample:>2}", ha="center", bbox=box)
            columns[step] += 1
axes.set(xlim=(-0.5, 7.5), ylim=(-2.5, 0.7), xticks=[])
axes.set_yticks([0, -1, -2], ["step 0", "step 1", "step 2"])
plt.show()

# %%
# The update of a step uses the mean over all its samples, wherever they were. The
# weights are therefore those of one process, except for the last digits: sums of
# floating point numbers depend on their order.

from safetensors.torch import load_file

one = load_file(folder / "runs/one/model.safetensors")
two = load_file(folder / "runs/two/model.safetensors")
for name in one:
    print(f"{name:10} largest difference {(one[name] - two[name]).abs().max():.1e}")

# %%
# The loss of the evaluation, too, is a mean in which each of the 21 samples counts
# once. Plain PyTorch computes the same from the weights:

import torch

x = torch.linspace(-1, 1, 21).unsqueeze(1)
model = torch.nn.Sequential(
    torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
)
model.load_state_dict(two)
print(f"{torch.nn.functional.mse_loss(model(x), x.square()):.6f}")

# %%
# A failure in one process
# ------------------------
# If one process fails, the others would wait for it in the next collective operation
# for ever. Here, rank 1 raises an error in step 11. All processes end within seconds,
# and the run folder says what happened first, and where.

import time

from robo_orchard_lab.pipeline.run.run_state import read_run_state

start = time.monotonic()
lines = run(
    "torchrun --standalone --nproc-per-node 2 train.py runs/broken fail", fails=True
)
print(f"ended after {time.monotonic() - start:.0f} seconds")

error = read_run_state(folder / "runs/broken").error
print(f"rank {error.rank}: {error.type}: {error.message}")
print(error.hook)

# %%
# Continue with another number of processes
# -----------------------------------------
# A checkpoint does not depend on the number of processes. The run of two processes has
# one of step 30, and one of step 60. Without the second, one process continues from
# step 30, with the same samples in each step.

import shutil

shutil.rmtree(folder / "runs/two/checkpoints/step_00000060")
lines = run("python train.py runs/two")

# %%
# Next
# ----
# - On two machines, or under SLURM, only the command changes: :doc:`/how_to/processes`.
# - Models that are too large for one GPU are sharded: :doc:`/how_to/sharding`.
