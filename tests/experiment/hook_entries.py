"""Entries of experiment files that set every field of every built-in hook.

The values differ from the defaults. Missing entries are reported by `test_hooks_in_files.py`.
"""

from __future__ import annotations

from typing import Any

_ACCURACY = {
    "class_type": "torchmetrics.classification.accuracy:MulticlassAccuracy",
    "num_classes": 3,
}

TRUST = (f"{__name__}:of_pairs",)
"""Names outside the catalogue."""

ENTRIES: dict[str, list[dict[str, Any]]] = {
    "ClearCacheHook": [{"every": "50 steps", "collect_garbage": True}],
    "EarlyStopping": [
        {
            "monitor": "eval/val/loss",
            "mode": "min",
            "patience": 3,
            "min_delta": 0.5,
            "stop_on": 0.25,
        }
    ],
    "LogImages": [
        {
            "every": "first | 5 steps",
            "source": "outputs",
            "key": "obs.image",
            "name": "seen",
            "max_images": 2,
            "mean": [0.5],
            "std": [0.25],
        }
    ],
    "EMA": [
        {
            "update_after_step": 10,
            "update_every": 2,
            "copy_first": True,
            "use_buffers": True,
            "copy_batch_norm": True,
            "inv_gamma": 2.0,
            "power": 0.5,
            "min_decay": 0.125,
            "max_decay": 0.5,
            "shadow_dtype": "float64",
            "optimizer": "g",
            "export_path": "ema.safetensors",
        },
        {"decay": 0.75},
    ],
    "FreezeHook": [
        {
            "patterns": ["layers.0.*"],
            "until_step": 5,
            "until_optimizer_step": 4,
            "until_epoch": 1,
            "eval_mode": True,
        }
    ],
    "GradientClippingHook": [
        {"max_norm": 1.5, "norm_type": 1.0, "optimizers": ["d"]},
        {"max_value": 0.5},
    ],
    "HookProfiler": [
        {"max_share": {"EMA": 0.05}, "trace_start_step": 3, "trace_steps": 2},
        {"max_share": 0.5},
    ],
    "KeepBest": [
        {
            "monitor": "eval/val/loss",
            "mode": "max",
            "path": "best/weights.safetensors",
            "min_delta": 0.5,
            "weights": "ema",
        }
    ],
    "LossTracker": [{"losses_key": "losses", "loss_names": ["box", "class"]}],
    "MetricTracker": [
        {
            "each_epoch": False,
            "metrics": {"accuracy": _ACCURACY},
            "metric_inputs": f"{__name__}:of_pairs",
        }
    ],
    "MetricsLogger": [
        {
            "every": "at steps 1, 5 | last",
            "sinks": [
                {"class_type": "JsonLinesSink", "path": "lines.jsonl"},
                {"class_type": "LogSink", "names": ["loss/*"]},
            ],
        },
        {"sinks": {"board": {"class_type": "TrackerSink", "trackers": ["tensorboard"]}}},
    ],
    "ModelSummary": [{"depth": 2}],
    "NonFiniteGuard": [
        {
            "policy": "skip",
            "max_skips_in_a_row": 3,
            "then": "rollback",
            "max_rollbacks": 2,
            "skip_batch": True,
            "restore_buffers": False,
            "quarantine": "bad",
            "max_quarantined": 1,
            "sample_ids": 2,
        },
        {"read": "one update late", "sample_ids": "index", "optimizers": ["d"]},
    ],
    "Preemption": [{"signals": ["SIGTERM"], "exit_code": 75, "save_checkpoint": False}],
    "ProgressBarHook": [
        {"metrics": ["grad_norm"], "refresh_seconds": 0.25, "plain": True, "lines": "all"}
    ],
    "Report": [{"every_seconds": 5.0}],
    "SamplePredictions": [
        {
            "every": "2 epochs",
            "images": "image",
            "targets": "label",
            "logits": "logits",
            "name": "predictions",
            "max_images": 4,
            "labels": ["a", "b", "c"],
            "mean": [0.5],
            "std": [0.5],
        }
    ],
    "SaveCheckpoint": [
        {
            "every": "20 steps | 30 min",
            "folder": "saved",
            "keep_last": 2,
            "keep_every": 100,
            "keep_best": 1,
            "monitor": "eval/val/loss",
            "mode": "min",
            "in_background": True,
            "when_busy": "skip",
            "on_failure": "stop",
            "digest": "sha256",
        }
    ],
    "SaveModel": [
        {
            "every": "1 epoch",
            "at_end": False,
            "folder": "exported",
            "weights": "ema",
            "card": {"license": "mit", "name": "small", "tags": ["toy"], "language": "en"},
        }
    ],
    "StatsMonitor": [{"every": "20 steps", "grad_norm_every_update": True}, {"grad_norm": False}],
    "TimeLimit": [
        {"limit": "slurm", "margin": "5 min", "exit_code": 3, "save_checkpoint": False},
        {"limit": "3h30min", "margin": 60.0, "exit_code": None},
    ],
    "TorchProfilerHook": [
        {
            "folder": "traces",
            "start_step": 2,
            "steps": 1,
            "warmup_steps": 0,
            "record_shapes": True,
            "profile_memory": True,
            "with_stack": True,
        }
    ],
    "ValidationHook": [
        {
            "every": "2 epochs",
            "at_start": True,
            "at_end": True,
            "weights": "ema",
            "seed": 7,
            "metrics": {"accuracy": _ACCURACY},
            "sets": ["more"],
            "max_batches": {"more": 2},
            "metric_inputs": f"{__name__}:of_pairs",
            "dataloaders": {
                "more": {
                    "class_type": "torch.utils.data.dataloader:DataLoader",
                    "dataset": {"class_type": "Spirals", "size": 30},
                    "batch_size": 10,
                }
            },
        },
        {"every": None, "at_end": True, "weights": {"raw": None, "ema": "ema"}, "max_batches": 1},
    ],
}

NAMED = [(name, entry) for name, entries in ENTRIES.items() for entry in entries]
"""The entries one by one, with the names of their hooks."""


def of_pairs(outputs: Any, batch: Any) -> tuple[Any, Any]:
    """Return metric inputs for batches of (inputs, targets)."""
    return outputs, batch[1]


def experiment(**hooks: dict[str, Any]) -> dict[str, Any]:
    """Return a small experiment with these hooks, as a file's document."""
    return {
        "model": {"class_type": "MLP", "inputs": 2, "hidden": [8], "outputs": 3},
        "data": {
            "train": {"dataset": {"class_type": "Spirals", "size": 48}, "batch_size": 8},
            "evaluation": {"val": {"dataset": {"class_type": "Spirals", "seed": 1}}},
        },
        "batch_processor": {
            "class_type": "SupervisedProcessor",
            "loss": {"class_type": "torch.nn:CrossEntropyLoss"},
        },
        "optimizer": {"class_type": "torch.optim:SGD", "lr": 0.1},
        "hooks": dict(hooks),
        "trainer": {"max_epoch": 1},
    }
