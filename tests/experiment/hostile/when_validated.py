"""Files that misuse trusted code, or have invalid values.

`trusted_parts` is trusted and writes a trace when any of its functions is called.
"""

from __future__ import annotations

from tests.experiment.hostile.corpus import FIELD, REFERENCE, Hostile, experiment, model, with_hook

SGD = "class_type: torch.optim:SGD, lr: 0.1"


def _error(says: str) -> str:
    """Return the error class for a name or a value."""
    return REFERENCE if "class_type: " in says or "names nothing" in says else FIELD


def _loader(text: str) -> str:
    return experiment(data=f"{{train: {{{text}}}}}")


KINDS = {
    "long_function": (
        "hooks",
        f"{{a: {{class_type: ValidationHook, metric_inputs: '{'a' * 100_000}'}}}}",
        "expected a reference like",
    ),
    "plain_class": (
        "model",
        "{class_type: trusted_parts:Plain}",
        "expected a subclass of",
    ),
    "class_as_config": ("model", "{config_type: trusted_parts:Net}", "expected a"),
    "builder_of_others": (
        "model",
        "{config_type: trusted_parts:PlainBuilder}",
        "expected a Module",
    ),
    "function_as_class": ("model", "{class_type: trusted_parts:make_anything}", "expected a"),
    "class_as_function": ("model", "{func: trusted_parts:Net, width: 1}", "expected a function"),
    "returns_nothing": ("model", "{func: trusted_parts:make_nothing}", "expected a function that"),
    "returns_untold": ("model", "{func: trusted_parts:make_untold}", "expected a function that"),
    "returns_text": ("model", "{func: trusted_parts:make_text}", "expected a function that"),
    "returns_anything": (
        "model",
        "{func: trusted_parts:make_anything}",
        "expected a function that",
    ),
    "returns_other": ("model", "{func: trusted_parts:make_optimizer}", "expected a function that"),
    "just_called": ("model", "{func: trusted_parts:called, x: 1}", "expected a function that"),
    "seen_from_there": ("model", "{class_type: trusted_parts:os}", "leads to a module"),
    "imported_there": ("model", "{func: trusted_parts:system}", "defined elsewhere"),
    "through_a_module": ("model", "{func: trusted_parts:os.system}", "names nothing"),
    "through_torch": ("model", "{func: trusted_parts:torch.load}", "names nothing"),
    "not_there": ("model", "{class_type: trusted_parts:Network}", "names nothing"),
    "no_such_module": ("model", "{class_type: trusted_parts.inner:Net}", "can't be imported"),
    "answers_to_all": ("model", "{class_type: trusted_parts:Trap.other}", "names nothing"),
    "property": ("model", "{class_type: trusted_parts:Trap.inner}", "leads to a property"),
    "other_name": ("model", "{class_type: trusted_parts:instance}", "defined elsewhere"),
    "an_instance": ("model", "{class_type: trusted_parts:lazy}", "leads to a Identity"),
    "breaks_on_import": ("model", "{class_type: trusted_broken:Net}", "can't be imported"),
}

VALUES = {
    "long_schedule": (
        "hooks",
        f"{{a: {{class_type: ValidationHook, every: '{'| ' * 50_000}'}}}}",
        "can't read ''",
    ),
    "plain_config": ("model", "{config_type: trusted_parts:PlainConfig}", "expected a Module"),
    "class_and_function": ("model", "{class_type: MLP, func: trusted_parts:called}", "found both"),
    "neither": ("model", "{inputs: 2}", "a mapping with 'class_type' or 'func'"),
    "unknown_argument": (
        "model",
        "{class_type: MLP, inputs: 2, hiddn: [4], outputs: 3}",
        "model.hiddn: ",
    ),
    "missing_argument": ("model", "{class_type: trusted_parts:Net}", "model.width: a value is req"),
    "text_as_number": ("model", "{class_type: trusted_parts:Net, width: wide}", "model.width: "),
    "null_as_number": ("model", "{class_type: trusted_parts:Net, width: null}", "model.width: "),
    "list_as_number": ("model", "{class_type: trusted_parts:Net, width: [1]}", "model.width: "),
    "part_as_number": (
        "model",
        "{class_type: trusted_parts:Net, width: {func: trusted_parts:called}}",
        "model.width",
    ),
    "given_argument": ("optimizer", f"{{{SGD}, params: [1]}}", "optimizer.params: is given"),
    "wrong_rate": ("optimizer", "{class_type: torch.optim:SGD, lr: fast}", "optimizer.lr: "),
    "misspelt_option": ("optimizer", f"{{{SGD}, momentun: 0.9}}", "did you mean 'momentum'?"),
    "group_option": (
        "optimizer",
        f"{{{SGD}, groups: {{a: {{parameters: ['*'], momentun: 1}}}}}}",
        "did you mean 'momentum'?",
    ),
    "group_of_text": ("optimizer", f"{{{SGD}, groups: {{a: {{parameters: all}}}}}}", "parameters"),
    "group_without": ("optimizer", f"{{{SGD}, groups: {{a: {{lr: 1}}}}}}", "parameters"),
    "negative_seed": ("seed", "-1", "seed: "),
    "large_seed": ("seed", str(2**64), "seed: "),
    "text_seed": ("seed", "a", "seed: "),
    "fraction_seed": ("seed", "1.5", "seed: "),
    "list_name": ("name", "[a]", "name: "),
    "null_name": ("name", "null", "name: "),
    "number_folder": ("run_folder", "3", "run_folder: "),
    "resume_maybe": ("resume", "maybe", "resume: "),
    "no_end": ("trainer", "{}", "the run has no limit"),
    "null_end": ("trainer", "{max_epoch: null}", "the run has no limit"),
    "zero_epochs": ("trainer", "{max_epoch: 0}", "trainer.max_epoch: "),
    "text_epochs": ("trainer", "{max_epoch: many}", "trainer.max_epoch: "),
    "unknown_limit": ("trainer", "{max_epochs: 1}", "did you mean 'max_epoch'?"),
    "precision": ("accelerator", "{mixed_precision: fp8x}", "accelerator.mixed_precision: "),
    "accelerator_field": ("accelerator", "{dynamo_backend: x}", "accelerator.dynamo_backend: "),
    "schedule_alone": (
        "lr_scheduler",
        "{class_type: torch.optim.lr_scheduler:StepLR}",
        "step_size",
    ),
    "schedule_field": (
        "lr_scheduler",
        "{class_type: torch.optim.lr_scheduler:StepLR, step_size: 1, gama: 1}",
        "did you mean 'gamma'?",
    ),
    "checkpoint_field": ("checkpoint", "{keep: 2}", "checkpoint.keep: "),
    "checkpoint_above": (
        "checkpoint",
        "{folder: ../x}",
        "checkpoint.folder: expected a path",
    ),
    "checkpoint_absolute": ("checkpoint", "{folder: /tmp/x}", "checkpoint.folder: expected a path"),
}

HOOKS = {
    "hook_field": ("{class_type: MetricsLogger, evrye: 3}", "did you mean 'every'?"),
    "hook_schedule": ("{class_type: MetricsLogger, every: 5 stepz}", "hooks.hook.every: "),
    "hook_text": ("{class_type: EMA, decay: much}", "hooks.hook.decay: "),
    "hook_null": ("{class_type: TimeLimit, limit: null}", "hooks.hook.limit: "),
    "best_above": (
        "{class_type: KeepBest, monitor: a, mode: min, path: ../../x.safetensors}",
        "hooks.hook.path: expected a path within the run folder",
    ),
    "best_absolute": (
        "{class_type: KeepBest, monitor: a, mode: min, path: /tmp/x.safetensors}",
        "hooks.hook.path: expected a path within the run folder",
    ),
    "model_above": ("{class_type: SaveModel, folder: ../x}", "hooks.hook.folder: expected a path"),
    "traces_absolute": (
        "{class_type: TorchProfilerHook, folder: /tmp/x}",
        "hooks.hook.folder: expected a path",
    ),
    "lines_absolute": (
        "{class_type: MetricsLogger, sinks: [{class_type: JsonLinesSink, path: /tmp/x.jsonl}]}",
        "hooks.hook.sinks.0.path: expected a path",
    ),
    "lines_above": (
        "{class_type: MetricsLogger, sinks: {a: {class_type: JsonLinesSink, path: ../x.jsonl}}}",
        "hooks.hook.sinks.a.path: expected a path",
    ),
    "tracker_absolute": (
        "{class_type: MetricsLogger, sinks: [{class_type: TrackerSink, trackers: [tensorboard], "
        "folder: /tmp/x}]}",
        "hooks.hook.sinks.0.folder: expected a path",
    ),
    "hook_as_sink": (
        "{class_type: MetricsLogger, sinks: [{class_type: EMA}]}",
        "sinks.0.class_type: ",
    ),
    "dataset_as_metric": (
        "{class_type: MetricTracker, metrics: {a: {class_type: Spirals}}}",
        "metrics.a.class_type: ",
    ),
    "signals": ("{class_type: Preemption, signals: [SIGKILL]}", "hooks.hook.signals"),
    "limit": ("{class_type: TimeLimit, limit: a while}", "hooks.hook.limit"),
}

LOADERS = {
    "no_dataset": ("batch_size: 4", "data.train.dataset: a value is required"),
    "negative_batch": ("dataset: {class_type: Spirals}, batch_size: -4", "data.train.batch_size: "),
    "loader_field": ("dataset: {class_type: Spirals}, shufffle: true", "did you mean 'shuffle'?"),
    "model_as_dataset": ("dataset: {class_type: MLP}", "data.train.dataset.class_type: expected a"),
    "workers": ("dataset: {class_type: Spirals}, num_workers: -1", "data.train.num_workers: "),
    "order_twice": (
        "dataset: {class_type: Spirals}, shuffle: true, "
        "sampler: {class_type: torch.utils.data:RandomSampler}",
        "data.train",
    ),
    "collate_module": (
        "dataset: {class_type: Spirals}, collate_fn: trusted_parts:os.system",
        "data.train.collate_fn: 'trusted_parts:os.system' names nothing",
    ),
}

WHEN_VALIDATED = [
    *(
        Hostile(
            name,
            "What stands in the place of a part.",
            experiment(**{field: text}),
            REFERENCE,
            says,
        )
        for name, (field, text, says) in KINDS.items()
    ),
    *(
        Hostile(name, "A value that means nothing.", experiment(**{field: text}), FIELD, says)
        for name, (field, text, says) in VALUES.items()
    ),
    *(
        Hostile(
            name, "A hook that does what it isn't there for.", with_hook(text), _error(says), says
        )
        for name, (text, says) in HOOKS.items()
    ),
    *(
        Hostile(name, "Data that is none.", _loader(text), _error(says), says)
        for name, (text, says) in LOADERS.items()
    ),
    Hostile(
        "name_of_checkpoint",
        "A hook that takes the place of the checkpoint's.",
        experiment("hooks: {checkpoint: {class_type: EMA}}\n"),
        FIELD,
        "hooks.checkpoint: ",
    ),
    Hostile(
        "lr_scheduler_without_optimizer",
        "Rates of nothing.",
        experiment(
            "lr_scheduler: {class_type: torch.optim.lr_scheduler:StepLR, step_size: 1}\n",
            optimizer="null",
        ),
        FIELD,
        "lr_scheduler: requires an optimizer",
    ),
    Hostile(
        "layers_within",
        "A call within a list of layers.",
        experiment(
            model="{class_type: torch.nn:Sequential, args: [{func: trusted_parts:os.system}]}"
        ),
        REFERENCE,
        "model.args.0.func: 'trusted_parts:os.system' names nothing",
    ),
    Hostile(
        "config_within",
        "A configuration of anything, where anything may stand.",
        model("MLP, inputs: 2, hidden: [4], outputs: {config_type: trusted_parts:PlainConfig}"),
        FIELD,
        "model.outputs",
    ),
]
