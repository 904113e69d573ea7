"""
Metrics and evaluation
======================

A training has to report how it goes: on the samples it learns from, and on samples it
has not seen. This tutorial publishes a metric from a hook, computes accuracies on both
kinds of samples, evaluates averaged weights, keeps the best ones, stops when there is
no more progress, and looks at single predictions.
"""

# %%
# A classifier
# ------------
# The data are points on the three arms of a spiral, and the classes are the arms. There
# are few points and much noise, to see where learning ends.

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from robo_orchard_lab.experiment.samples import MLP, Spirals
from robo_orchard_lab.pipeline import HookBasedTrainer, SupervisedProcessor

train = Spirals(300, noise=0.06, seed=0)
val = Spirals(300, noise=0.06, seed=1)
test = Spirals(900, noise=0.06, seed=2)


def make_trainer(hooks, max_epoch, processor=None):
    """Return a trainer of a new model; the same seed, the same numbers."""
    torch.manual_seed(0)
    model = MLP(inputs=2, hidden=[64, 64], outputs=3)
    return HookBasedTrainer(
        accelerator=Accelerator(cpu=True),
        model=model,
        dataloader=DataLoader(train, batch_size=50, shuffle=True),
        batch_processor=processor or SupervisedProcessor(torch.nn.CrossEntropyLoss()),
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        hooks=hooks,
        max_epoch=max_epoch,
    )


# %%
# Publish a metric
# ----------------
# A hook publishes a value under a name, in every step if it likes. The value stays on
# its device, and no step waits for it. ``MetricsLogger`` makes *logging points*: there,
# values are averaged over steps and ranks, read in one transfer, and written to sinks.
# A sink is a class with ``open``, ``write`` and ``close``. This one prints, and keeps
# the values for a plot.

from robo_orchard_lab.pipeline import PipelineHooks
from robo_orchard_lab.pipeline.hooks import LossTrackerConfig, MetricsLoggerConfig

margins = PipelineHooks("margins")


@margins.on_model_forward.after
def publish_margin(args):
    """Publish the mean distance of the best class from the next one."""
    first, second = args.model_outputs.detach().topk(2).values.unbind(-1)
    args.metrics.publish(
        "train/margin", (first - second).mean(), weight=args.batch_size
    )


class PrintSink:
    """Print some metrics at each logging point, and keep all of them."""

    def __init__(self, *names):
        self.names = names
        self.points = {}  # metric -> list of (step, value)

    def open(self, args): ...

    def write(self, record):
        for value in record.values:
            self.points.setdefault(value.name, []).append((value.step, value.value))
        shown = [
            f"{v.name} {v.value:.3f}" for v in record.values if v.name in self.names
        ]
        print(f"step {record.global_step_id:3}", *shown, sep="  ")

    def close(self): ...


sink = PrintSink("loss/total", "train/margin")
hooks = [
    MetricsLoggerConfig(every="6 steps")(sinks=[sink]),
    LossTrackerConfig(),
    margins,
]
make_trainer(hooks, max_epoch=3)()

# %%
# ``publish`` has another argument, ``reduce``: ``mean`` (with weights, here the number
# of samples), ``sum``, ``max``, ``min`` or ``last``.
#
# Evaluate
# --------
# ``ValidationHook`` evaluates on named loaders, with any metrics of torchmetrics.
# ``MetricTracker`` computes the same on the training batches. ``EMA`` keeps a moving
# average of the weights, and the evaluation measures both: the raw weights and the
# average. ``KeepBest`` writes the best average, and ``EarlyStopping`` requests the end
# of the run after three evaluations without a better value.

import tempfile
from pathlib import Path

from torchmetrics.classification import MulticlassAccuracy

from robo_orchard_lab.pipeline.hooks import (
    EarlyStoppingConfig,
    EMAConfig,
    KeepBestConfig,
    MetricTrackerConfig,
    ValidationHookConfig,
)

folder = Path(tempfile.mkdtemp(prefix="metrics-"))
accuracy = {"accuracy": MulticlassAccuracy(3, average="micro")}
best = "eval/val/ema/accuracy"
sink = PrintSink("train/accuracy", "eval/val/raw/accuracy", best)

trainer = make_trainer(
    hooks=[
        MetricsLoggerConfig(every="10 epochs")(sinks=[sink]),
        LossTrackerConfig(),
        MetricTrackerConfig(each_epoch=False)(metrics=accuracy),
        EMAConfig(decay=0.95),
        ValidationHookConfig(every="10 epochs", weights={"raw": None, "ema": "EMA"})(
            dataloaders={"val": DataLoader(val, batch_size=100)}, metrics=accuracy
        ),
        KeepBestConfig(
            monitor=best, mode="max", weights="EMA", path=folder / "best.safetensors"
        ),
        EarlyStoppingConfig(monitor=best, mode="max", patience=3),
    ],
    max_epoch=200,
)
trainer()
print("stopped after epoch", trainer.progress.epoch_id)

# %%
# The average varies less from one evaluation to the next than the raw weights do. The
# accuracy on training batches is lower: it is a mean over all steps since the last
# logging point, also of those with less trained weights.

import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for name in sink.names:
    axes.plot(*zip(*sink.points[name], strict=True), label=name)
axes.set(xlabel="step", ylabel="accuracy")
axes.legend()
plt.show()

# %%
# Measure on the test set
# -----------------------
# ``trainer.evaluate`` does one evaluation outside of the training, by default of the
# losses. Here it measures the best weights: plain safetensors, for any code. They were
# chosen by the validation set, so the accuracy on the test set is the honest one.

from safetensors.torch import load_file

trainer.model.load_state_dict(load_file(folder / "best.safetensors"))
results = trainer.evaluate({"test": DataLoader(test, batch_size=300)}, metrics=accuracy)
for name, value in results.items():
    print(f"{name:15} {value:.4f}")

# %%
# Each sample counts once, also in a smaller last batch, and with several processes.
# Plain PyTorch agrees:

with torch.no_grad():
    outputs = trainer.model(test.points)
    print(f"{torch.nn.functional.cross_entropy(outputs, test.labels):.4f}")
    print(f"{(outputs.argmax(-1) == test.labels).float().mean():.4f}")

# %%
# Values of your own
# ------------------
# Some values need more than a metric class. A batch processor may define
# ``evaluation_forward``, which returns outputs and named values. Each is published as
# a mean over all samples.


class WithConfidence(SupervisedProcessor):
    """Classification that also reports the probability of the right class."""

    def evaluation_forward(self, model, batch):
        outputs, loss = self.forward(model, batch)
        right = outputs.softmax(-1).gather(1, batch[1].unsqueeze(1))
        return outputs, {"loss": loss, "confidence": right.mean()}


weights = trainer.model.state_dict()
processor = WithConfidence(torch.nn.CrossEntropyLoss())
trainer = make_trainer(hooks=[], max_epoch=1, processor=processor)
trainer.model.load_state_dict(weights)
print(trainer.evaluate({"test": DataLoader(test, batch_size=300)}))

# %%
# Look at predictions
# -------------------
# ``trainer.predict`` returns the outputs of each sample with its index in the dataset,
# on every rank. The wrong predictions lie where the arms touch.

predictions = trainer.predict(DataLoader(test, batch_size=300))
arms = torch.as_tensor(predictions.outputs["output"]).argmax(-1)
wrong = arms != test.labels
print(f"{int(wrong.sum())} of {len(predictions.indices)} predictions are wrong")

figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
axes.scatter(*test.points.T, c=test.labels, s=6, cmap="Set2", vmax=7)
axes.scatter(*test.points[wrong].T, s=30, facecolors="none", edgecolors="black")
axes.set_title("test points by class, wrong predictions circled")
plt.show()

# %%
# Next
# ----
# - The commands ``evaluate``, ``test`` and ``predict`` do the same for a saved run:
#   :doc:`/how_to/command_line`, :doc:`/how_to/predict`.
# - ``SaveCheckpoint`` keeps the best checkpoint: :doc:`/how_to/best_checkpoint`.
# - Images, videos and tables go to the report, too: :doc:`/how_to/media`.
