"""Untrusted names of code, and names that resemble trusted names."""

from __future__ import annotations

from tests.experiment.hostile.corpus import (
    REFERENCE,
    TRUST,
    Hostile,
    experiment,
    model,
    with_hook,
)

LIBRARY = {
    "os_system": ("os:system", "A shell."),
    "posix_system": ("posix:system", "The same where it is defined."),
    "eval": ("builtins:eval", "An expression."),
    "exec": ("builtins:exec", "A program."),
    "import": ("builtins:__import__", "Any module."),
    "open": ("_io:open", "Any file, emptied."),
    "popen": ("subprocess:Popen", "A process."),
    "check_output": ("subprocess:check_output", "A process."),
    "import_module": ("importlib:import_module", "Any module."),
    "run_path": ("runpy:run_path", "Any script."),
    "pickle_loads": ("pickle:loads", "A pickle."),
    "shelve": ("shelve:open", "A pickle by another name."),
    "rmtree": ("shutil:rmtree", "A folder that is gone."),
    "ctypes": ("ctypes:CDLL", "A library."),
    "pty": ("pty:spawn", "A shell."),
    "urlopen": ("urllib.request:urlretrieve", "A download."),
    "torch_load": ("torch.serialization:load", "A pickle."),
    "torch_load_public": ("torch:load", "A pickle by its public name."),
    "hub_load": ("torch.hub:load", "A repository, fetched and run."),
    "jit_load": ("torch.jit._serialization:load", "A program of tensors."),
    "inline_extension": ("torch.utils.cpp_extension:load_inline", "A compiler."),
    "compile": ("torch:compile", "A compiler."),
    "vmap_private": ("torch._C:_jit_pass_inline", "What has a leading underscore."),
    "numpy_load": ("numpy.lib.npyio:load", "A pickle in an array."),
    "mnist": ("torchvision.datasets.mnist:MNIST", "A download to any folder."),
    "cifar": ("torchvision.datasets.cifar:CIFAR10", "A pickle in a dataset."),
    "dataset_folder": ("torchvision.datasets.folder:DatasetFolder", "A loader of one's choice."),
    "fid": ("torchmetrics.image.fid:FrechetInceptionDistance", "A network that is fetched."),
    "remove_tree": ("robo_orchard_lab.pipeline.run.durable:remove_tree", "A folder that is gone."),
    "our_resolve": ("robo_orchard_core.utils.config.references:resolve", "Any import."),
    "our_testing": ("robo_orchard_lab.testing.fixtures:isolated", "What tests use."),
    "our_git": ("robo_orchard_lab.pipeline.run.run_info:git_state", "A process."),
    "accelerate": ("accelerate.utils.launch:prepare_simple_launcher_cmd_env", "A launcher."),
    "pydantic": ("pydantic.deprecated.parse:load_file", "A pickle."),
    "yaml": ("yaml:unsafe_load", "A tag that is obeyed."),
    "not_installed": ("no_such_package_at_all:Thing", "Whoever registers that name next."),
}

SPELLINGS = {
    "newline": ('"torch.optim.sgd:SGD\\n"', "A check that stops at the end of a line.", REFERENCE),
    "space": ('" torch.optim.sgd:SGD"', "A check that strips.", REFERENCE),
    "zero_width": ('"torch.optim.sgd:S\\u200bGD"', "A name with something unseen.", REFERENCE),
    "soft_hyphen": ('"torch.opt\\u00adim.sgd:SGD"', "The same.", REFERENCE),
    "right_to_left": ('"torch.optim.sgd:\\u202eDGS"', "A name that is read backwards.", REFERENCE),
    "cyrillic": ('"t\\u043erch.optim.sgd:SGD"', "A letter that looks like another.", TRUST),
    "fullwidth": ('"\\uff54orch.optim.sgd:SGD"', "What Python takes for another in source.", TRUST),
    "fullwidth_colon": ('"torch.optim.sgd\\uff1aSGD"', "A colon that is none.", REFERENCE),
    "capitals": ("Torch.optim.sgd:SGD", "A file system that knows no capitals.", TRUST),
    "nul": ('"trusted_parts\\0:Net"', "A name that C reads to its middle.", REFERENCE),
    "two_colons": ("trusted_parts:Net:system", "Another last part.", REFERENCE),
    "no_module": ('":system"', "No module.", REFERENCE),
    "no_name": ('"os:"', "No name.", REFERENCE),
    "only_colon": ('":"', "Neither.", REFERENCE),
    "empty": ('""', "Nothing.", REFERENCE),
    "leading_dots": ('"..trusted_parts:Net"', "An import from above.", REFERENCE),
    "double_dot": ('"trusted_parts..os:system"', "An empty package.", REFERENCE),
    "path": ('"../trusted_parts:Net"', "A path.", REFERENCE),
    "file": ('"file:///tmp/x.py:Net"', "A file.", REFERENCE),
    "call": ('"trusted_parts:Net()"', "A call.", REFERENCE),
    "item": ('"trusted_parts:Net[0]"', "An item.", REFERENCE),
    "lambda": ('"trusted_parts:<lambda>"', "A function without a name.", REFERENCE),
    "keyword_argument": ('"trusted_parts:Net, x=1"', "An argument.", REFERENCE),
    "percent": ('"trusted_parts%3aNet"', "What a browser reads otherwise.", REFERENCE),
    "bare_os": ("system", "A short name of somebody else.", REFERENCE),
    "only_module": ("trusted_parts", "A module.", REFERENCE),
    "main": ("__main__:system", "The program that reads the file.", TRUST),
    "main_of_trusted": (
        "trusted_parts.__main__:main",
        "A command of a trusted package.",
        REFERENCE,
    ),
    "globals": ("trusted_parts:make.__globals__.os", "From a function to what it sees.", REFERENCE),
    "subclasses": ("trusted_parts:Net.__subclasses__", "From a class to all others.", REFERENCE),
    "loader": ("trusted_parts:__loader__.exec_module", "What has loaded a module.", REFERENCE),
    "longer": ("trusted_parts_of_mine:Net", "A name that begins like a trusted one.", TRUST),
    "shorter": ("trusted_part:Net", "A name that a trusted one begins with.", TRUST),
    "above": ("robo_orchard_lab:Net", "The package around what is listed.", TRUST),
    "method": ("torch.optim.sgd:SGD.step", "Something in what is listed.", TRUST),
    "module_as_class": ("torch.optim:sgd", "The module of what is listed.", TRUST),
    "other_module": ("torch.optim.adam:SGD", "What is listed, elsewhere.", TRUST),
    "long": (f"trusted_parts:{'N' * 5000}", "A message that fills the screen.", REFERENCE),
    "long_path": (f"trusted_parts{'.x' * 5000}:N", "Imports without an end.", REFERENCE),
    "number": ("3", "A number.", REFERENCE),
    "null": ("null", "Nothing.", REFERENCE),
    "truth": ("true", "A truth.", REFERENCE),
    "list": ("[os, system]", "A list.", REFERENCE),
    "mapping": ("{os: system}", "A mapping.", REFERENCE),
}

SYSTEM = "{func: 'os:system', command: touch pwned}"

PLACES = [
    Hostile(
        "as_config",
        "A configuration that builds anything.",
        model(
            "robo_orchard_core.utils.config.build:CallableConfig, func: 'os:system'",
            "config_type",
        ),
        TRUST,
        "model.config_type",
    ),
    Hostile(
        "as_class_config",
        "The same of classes.",
        model(
            "robo_orchard_core.utils.config.parts:ClassConfig, class_type: 'subprocess:Popen'",
            "config_type",
        ),
        TRUST,
        "model.config_type",
    ),
    Hostile(
        "as_settings",
        "A configuration that reads the environment.",
        model("pydantic_settings.main:BaseSettings", "config_type"),
        TRUST,
        "model.config_type",
    ),
    Hostile(
        "as_dataset",
        "A shell, as what is loaded.",
        experiment(data=f"{{train: {{dataset: {SYSTEM}}}}}"),
        TRUST,
        "data.train.dataset.func",
    ),
    Hostile(
        "as_evaluation",
        "A shell, as what is evaluated on.",
        experiment(data=f"{{train: {{}}, evaluation: {{a: {{dataset: {SYSTEM}}}}}}}"),
        TRUST,
        "data.evaluation.a.dataset.func",
    ),
    Hostile(
        "as_sampler",
        "A shell, as an order.",
        experiment(data=f"{{train: {{dataset: {{}}, sampler: {SYSTEM}}}}}"),
        TRUST,
        "sampler.func",
    ),
    Hostile(
        "as_collate_fn",
        "A shell, as a function that stands alone.",
        experiment(data="{train: {dataset: {class_type: Spirals}, collate_fn: 'os:system'}}"),
        TRUST,
        "data.train.collate_fn: 'os:system' is not trusted",
    ),
    Hostile(
        "as_loss",
        "A shell, as a loss.",
        experiment(batch_processor=f"{{class_type: SupervisedProcessor, loss: {SYSTEM}}}"),
        TRUST,
        "batch_processor.loss.func",
    ),
    Hostile(
        "as_trigger",
        "A shell, as a schedule.",
        experiment(f"lr_scheduler: {SYSTEM}\n"),
        TRUST,
        "lr_scheduler.func",
    ),
    Hostile(
        "as_inner_schedule",
        "The same, within another.",
        experiment(
            "lr_scheduler: {class_type: torch.optim.lr_scheduler:SequentialLR, "
            f"schedulers: [{SYSTEM}]}}\n"
        ),
        TRUST,
        "lr_scheduler.schedulers.0.func",
    ),
    Hostile("as_hook", "A shell, as a hook.", with_hook(SYSTEM), TRUST, "hooks.hook.func"),
    Hostile(
        "as_sink",
        "A shell, as where metrics go.",
        with_hook(f"{{class_type: MetricsLogger, sinks: [{SYSTEM}]}}"),
        TRUST,
        "hooks.hook.sinks.0.func",
    ),
    Hostile(
        "as_named_sink",
        "The same, by name.",
        with_hook(f"{{class_type: MetricsLogger, sinks: {{a: {SYSTEM}}}}}"),
        TRUST,
        "hooks.hook.sinks.a.func",
    ),
    Hostile(
        "as_metric",
        "A shell, as a metric.",
        with_hook(f"{{class_type: MetricTracker, metrics: {{a: {SYSTEM}}}}}"),
        TRUST,
        "hooks.hook.metrics.a.func",
    ),
    Hostile(
        "as_layer",
        "A shell, as a layer.",
        experiment(model=f"{{class_type: torch.nn:Sequential, args: [{SYSTEM}]}}"),
        TRUST,
        "model.args.0.func",
    ),
    Hostile(
        "as_checkpoint",
        "A shell, among a checkpoint's fields.",
        experiment(f"checkpoint: {{more: {SYSTEM}}}\n"),
        TRUST,
        "checkpoint.more.func",
    ),
    Hostile(
        "deep_within",
        "A shell that nobody reads as far as.",
        experiment(model=f"{{class_type: MLP, a: [[{{b: {{c: [{SYSTEM}]}}}}]]}}"),
        TRUST,
        "model.a.0.0.b.c.0.func",
    ),
    Hostile(
        "tracker",
        "Everything that a run logs, sent to somebody.",
        with_hook(
            "{class_type: MetricsLogger, sinks: [{class_type: TrackerSink, "
            "trackers: [wandb], options: {wandb: {entity: somebody}}}]}"
        ),
        TRUST,
        "the tracker 'wandb' (str) is not trusted",
    ),
    Hostile(
        "tracker_config",
        "The same by the configuration's name.",
        with_hook(
            "{class_type: MetricsLogger, sinks: [{config_type: TrackerSinkConfig, "
            "trackers: [mlflow]}]}"
        ),
        TRUST,
        "the tracker 'mlflow' (str) is not trusted",
    ),
]

NAMES = [
    *(
        Hostile(f"{key}_{name}", tries, model(f"'{reference}'", key), TRUST, f"model.{key}: ")
        for name, (reference, tries) in LIBRARY.items()
        for key in ("class_type", "func")
    ),
    *(
        Hostile(f"spelt_{name}", tries, model(text), error, "model.class_type: ")
        for name, (text, tries, error) in SPELLINGS.items()
    ),
    *PLACES,
]
