"""Files that lead to others, fields that lead out, and values in wrong places."""

from __future__ import annotations

from tests.experiment.hostile.corpus import (
    ANY,
    FIELD,
    REFERENCE,
    SYNTAX,
    Hostile,
    experiment,
)

_BESIDE = {"other.yaml": experiment()}


def base(name: str) -> str:
    """An experiment that builds on a file."""
    return f"base: {name}\nname: variant\n"


BASES = [
    Hostile(
        "base_above",
        "Any file, shown in an error.",
        base("../other.yaml"),
        FIELD,
        "yaml:1: base: expected the name of a file beside",
    ),
    Hostile("base_absolute", "The same.", base("/etc/passwd"), FIELD, "base: expected the name"),
    Hostile(
        "base_in_folder",
        "A file that isn't seen beside it.",
        base("inner/other.yaml"),
        FIELD,
        "base: expected the name",
        folders=("inner",),
    ),
    Hostile(
        "base_here",
        "The same file by another name.",
        base("./experiment.yaml"),
        FIELD,
        "base: expected the name",
    ),
    Hostile(
        "base_backslash",
        "A folder of another system.",
        base("'..\\other.yaml'"),
        FIELD,
        "base: expected the name",
    ),
    Hostile(
        "base_drive",
        "A drive of another system.",
        base("'c:other.yaml'"),
        FIELD,
        "base: expected the name",
    ),
    Hostile("base_home", "A home folder.", base("~/other.yaml"), FIELD, "base: expected the name"),
    Hostile(
        "base_url",
        "A download.",
        base("https://example.org/other.yaml"),
        FIELD,
        "base: expected the name",
    ),
    Hostile("base_dots", "The folder above.", base("'..'"), FIELD, "base: expected the name"),
    Hostile("base_nothing", "The folder itself.", base("''"), FIELD, "base: expected the name"),
    Hostile(
        "base_newline",
        "A name of two lines.",
        base('"other.yaml\\n"'),
        FIELD,
        "base: expected the name",
    ),
    Hostile(
        "base_nul",
        "A name that C reads to its middle.",
        base('"other.yaml\\0.txt"'),
        FIELD,
        "base: expected the name",
    ),
    Hostile("base_list", "Several.", base("[other.yaml]"), FIELD, "base: expected the name"),
    Hostile("base_mapping", "Fields in its place.", base("{name: x}"), FIELD, "base: expected the"),
    Hostile(
        "base_missing",
        "A file that isn't there.",
        base("other.yaml"),
        FIELD,
        "yaml:1: base: 'other.yaml' can't be read: No such file",
    ),
    Hostile(
        "base_long",
        "A name that no file has.",
        base("x" * 5000 + ".yaml"),
        FIELD,
        "base: expected the name",
    ),
    Hostile(
        "base_link",
        "Any file, through a link in an archive.",
        base("other.yaml"),
        FIELD,
        "'other.yaml' is a link",
        links={"other.yaml": "/etc/passwd"},
    ),
    Hostile(
        "base_link_here",
        "A link to a file beside it.",
        base("link.yaml"),
        FIELD,
        "'link.yaml' is a link",
        beside=_BESIDE,
        links={"link.yaml": "other.yaml"},
    ),
    Hostile(
        "base_link_loop",
        "A link to itself.",
        base("other.yaml"),
        FIELD,
        "'other.yaml' is a link",
        links={"other.yaml": "other.yaml"},
    ),
    Hostile(
        "base_device",
        "Zeros without an end.",
        base("other.yaml"),
        FIELD,
        "'other.yaml' is a link",
        links={"other.yaml": "/dev/zero"},
    ),
    Hostile(
        "itself_a_link",
        "Any file, shown in an error.",
        "",
        ANY,
        "is a link",
        links={"experiment.yaml": "/etc/passwd"},
    ),
    Hostile(
        "base_pipe",
        "A wait for somebody who never writes.",
        base("other.yaml"),
        FIELD,
        "'other.yaml' is no regular file",
        pipes=("other.yaml",),
    ),
    Hostile(
        "base_folder",
        "A folder.",
        base("other.yaml"),
        FIELD,
        "'other.yaml' is no regular file",
        folders=("other.yaml",),
    ),
    Hostile("base_itself", "A circle.", base("experiment.yaml"), FIELD, "base: leads back to"),
    Hostile(
        "base_circle",
        "A larger circle.",
        base("a.yaml"),
        FIELD,
        "b.yaml:1: base: leads back",
        beside={"a.yaml": base("b.yaml"), "b.yaml": base("experiment.yaml")},
    ),
    Hostile(
        "base_chain",
        "Files without an end.",
        base("0.yaml"),
        FIELD,
        "base: is one more than",
        beside={f"{n}.yaml": base(f"{n + 1}.yaml") for n in range(40)},
    ),
    Hostile(
        "base_large",
        "Data in the place of a description.",
        base("other.yaml"),
        FIELD,
        "'other.yaml' is larger than",
        beside={"other.yaml": f"# {'x' * 300_000}"},
    ),
    Hostile(
        "bases_large",
        "Many files that are each not too large.",
        base("0.yaml"),
        FIELD,
        "is larger than the 131072 bytes",
        beside={f"{n}.yaml": base(f"{n + 1}.yaml") + f"# {'x' * 30_000}\n" for n in range(9)},
    ),
    Hostile(
        "base_with_tag",
        "A call in the file that isn't looked at.",
        base("other.yaml"),
        SYNTAX,
        "other.yaml:1: name: YAML tags are not read",
        beside={"other.yaml": "name: !!python/object/apply:os.system [x]\n"},
    ),
    Hostile(
        "base_reference",
        "A shell in the file that isn't looked at.",
        base("other.yaml"),
        "TrustError",
        "other.yaml:2: model.class_type: 'os:system' is not trusted",
        beside={"other.yaml": experiment(model="{class_type: os:system}")},
    ),
    Hostile(
        "base_suffix",
        "A program.",
        base("other.py"),
        ANY,
        "a file name that ends in",
        beside={"other.py": "import os\n"},
    ),
    Hostile(
        "base_binary",
        "What is no text.",
        base("other.yaml"),
        SYNTAX,
        "expected UTF-8",
        beside={"other.yaml": b"\xff\xfe\x00"},
    ),
    Hostile(
        "base_removes",
        "A hook that is removed and was never there.",
        base("other.yaml") + "hooks: {stats: null}\n",
        FIELD,
        "null removes an entry",
        beside=_BESIDE,
    ),
]

FOLDERS = [
    Hostile(
        "folder_absolute",
        "Any folder.",
        experiment("run_folder: /etc\n"),
        FIELD,
        "run_folder: a file can only have its run in a folder below",
    ),
    Hostile(
        "folder_above",
        "The folder above.",
        experiment("run_folder: ../x\n"),
        FIELD,
        "run_folder: a file can only",
    ),
    Hostile(
        "folder_round_trip",
        "The same, after a detour.",
        experiment("run_folder: a/b/../../../x\n"),
        FIELD,
        "run_folder: a file can only",
    ),
    Hostile(
        "folder_here",
        "The folder one is in, whose config.yaml is replaced.",
        experiment("run_folder: .\n"),
        FIELD,
        "run_folder: a file can only",
    ),
    Hostile(
        "folder_nothing",
        "The same.",
        experiment("run_folder: ''\n"),
        FIELD,
        "run_folder: a file can only",
    ),
    Hostile(
        "folder_backslash",
        "The folder above, of another system.",
        experiment("run_folder: 'a\\..\\..\\x'\n"),
        FIELD,
        "run_folder: a file can only",
    ),
    Hostile(
        "folder_drive",
        "A drive of another system.",
        experiment("run_folder: 'c:\\x'\n"),
        FIELD,
        "run_folder: a file can only",
    ),
    Hostile(
        "folder_share",
        "A machine of another system.",
        experiment("run_folder: '\\\\host\\share'\n"),
        FIELD,
        "run_folder: a file can only",
    ),
    Hostile(
        "folder_nul",
        "A name that C reads to its middle.",
        experiment('run_folder: "a\\0b"\n'),
        FIELD,
        "run_folder: a file can only",
    ),
    Hostile(
        "folder_newline",
        "A name that forges lines of a log.",
        experiment('run_folder: "a\\nERROR"\n'),
        FIELD,
        "run_folder: a file can only",
    ),
    Hostile(
        "folder_long",
        "A name that no folder has.",
        experiment(f"run_folder: {'x' * 100_000}\n"),
        FIELD,
        "run_folder: expected names of at",
    ),
    Hostile(
        "folder_link",
        "Any folder, through a link in an archive.",
        experiment("run_folder: out/run\n"),
        FIELD,
        "run_folder: a file can't have its run behind",
        links={"out": "/tmp"},
    ),
    Hostile(
        "folder_link_inner",
        "The same, further in.",
        experiment("run_folder: inner/out/run\n"),
        FIELD,
        "behind the link 'inner/out'",
        folders=("inner",),
        links={"inner/out": "/tmp"},
    ),
    Hostile(
        "many_hooks",
        "Time by the square of the number of names.",
        experiment(
            hooks="{"
            + ", ".join(f"h{n}: {{class_type: EMA}}" for n in range(4000))
            + ", h5000: {}}"
        ),
        FIELD,
        "hooks.h5000: there is none of this name",
    ),
    Hostile(
        "many_long_names",
        "The same of names that are nearly the same.",
        experiment(
            hooks="{"
            + ", ".join(f"{'a' * 150}{n}: {{class_type: EMA}}" for n in range(700))
            + f", {'a' * 155}: {{}}}}"
        ),
        FIELD,
        "there is none of this name",
    ),
    Hostile(
        "key_escapes",
        "A hook's name that a terminal obeys wherever it is logged.",
        experiment(hooks='{"a\\e[2J": {class_type: EMA}}'),
        FIELD,
        'hooks."a\\u001b[2J": expected a key that can be printed',
    ),
    Hostile(
        "key_newline",
        "A metric's name that writes a line of the log.",
        experiment(hooks='{a: {class_type: MetricTracker, metrics: {"a\\nERROR": {}}}}'),
        FIELD,
        "expected a key that can be printed",
    ),
    Hostile(
        "folder_of_files",
        "Weights, and a config.yaml, that somebody else has put there.",
        experiment("run_folder: mine\n"),
        FIELD,
        "run_folder: a file can't have its run among other files",
        folders=("mine",),
        beside={"mine/config.yaml": "seed: 0"},
    ),
    Hostile(
        "folder_hidden",
        "A folder whose files a shell runs.",
        experiment("run_folder: .config/fish/conf.d\n"),
        FIELD,
        "run_folder: a file can only",
    ),
    Hostile(
        "folder_hidden_inner",
        "A folder whose files git runs.",
        experiment("run_folder: sub/.git/hooks\n"),
        FIELD,
        "run_folder: a file can only",
    ),
    Hostile(
        "folder_with_link",
        "A file that exists already, through a link that an archive has put where a run writes.",
        experiment("run_folder: run\n"),
        FIELD,
        "run_folder: a file can't have its run where the link 'run/metrics.jsonl' leads out",
        folders=("run", "run/starts"),
        links={"run/metrics.jsonl": "/etc/hostname"},
    ),
    Hostile(
        "folder_with_link_above",
        "A folder beside the run's, through a link further in.",
        experiment("run_folder: run\n"),
        FIELD,
        "where the link 'run/inner/model' leads out",
        folders=("run", "run/starts", "run/inner", "other"),
        links={"run/inner/model": "../../other"},
    ),
    Hostile(
        "folder_of_base",
        "Any folder, said by the file that isn't looked at.",
        base("other.yaml"),
        FIELD,
        "other.yaml:7: run_folder: a file can only",
        beside={"other.yaml": experiment("run_folder: /etc\n")},
    ),
    Hostile(
        "name_above",
        "Any folder, since a run is in one of its name.",
        experiment(name="../../etc"),
        FIELD,
        "name: a file can only have its run",
    ),
    Hostile("name_absolute", "The same.", experiment(name="/etc"), FIELD, "name: a file can only"),
    Hostile(
        "name_long",
        "A name that no folder has.",
        experiment(name="x" * 5000),
        FIELD,
        "name: expected names of at most 255 bytes",
    ),
    Hostile(
        "name_link",
        "Any folder, through the link that runs are behind.",
        experiment(),
        FIELD,
        "name: a file can't have its run behind the link 'runs'",
        links={"runs": "/tmp"},
    ),
]

FIELDS = [
    Hostile(
        "trust",
        "Trust in whoever sent it.",
        experiment("trust: [os]\n"),
        FIELD,
        "trust: no file says whom to trust",
    ),
    Hostile(
        "trust_of_base",
        "The same, by the file that isn't looked at.",
        base("other.yaml"),
        FIELD,
        "other.yaml:7: trust: no file says",
        beside={"other.yaml": experiment("trust: all\n")},
    ),
    Hostile(
        "unknown_field",
        "What a later version may obey.",
        experiment("plugins: [x]\n"),
        FIELD,
        "plugins: an experiment has no such field",
    ),
    Hostile(
        "misspelt_field",
        "A limit that is never kept.",
        experiment("trainr: {max_epoch: 1}\n"),
        FIELD,
        "did you mean 'trainer'?",
    ),
    Hostile(
        "dunder_field",
        "What Python looks at.",
        experiment("__class__: x\n"),
        FIELD,
        "__class__: an experiment has no such field",
    ),
    Hostile(
        "dotted_field",
        "A field that another program takes apart.",
        experiment("trainer.max_epoch: 3\n"),
        FIELD,
        '"trainer.max_epoch": an experiment has no',
    ),
    Hostile(
        "no_model", "Half an experiment.", experiment(model=None), FIELD, "model: a value is req"
    ),
    Hostile(
        "no_data", "Half an experiment.", experiment(data=None), FIELD, "data: a value is requ"
    ),
    Hostile(
        "no_processor",
        "Half an experiment.",
        experiment(batch_processor=None),
        FIELD,
        "batch_processor: a value is required",
    ),
    Hostile(
        "no_trainer", "A run without an end.", experiment(trainer=None), FIELD, "trainer: a val"
    ),
    Hostile(
        "null_trainer",
        "Nothing in the place of fields.",
        experiment(trainer="null"),
        FIELD,
        "trainer: expected a mapping, found None",
    ),
    Hostile("null_data", "The same.", experiment(data="null"), FIELD, "data: expected a mapping"),
    Hostile(
        "text_as_part",
        "A name without its mapping.",
        experiment(model="os:system"),
        FIELD,
        "model: expected a mapping, found 'os:system'",
    ),
    Hostile(
        "list_as_part",
        "Several.",
        experiment(optimizer="[{class_type: MLP}]"),
        FIELD,
        "optimizer: expected a mapping, found [",
    ),
    Hostile(
        "hooks_as_list",
        "Hooks that can't be named.",
        experiment("hooks: [{class_type: EMA}]\n"),
        FIELD,
        "hooks: expected a mapping, found [",
    ),
    Hostile(
        "hook_as_text",
        "A hook that is a name.",
        experiment("hooks: {ema: EMA}\n"),
        FIELD,
        "hooks.ema: expected a mapping, found 'EMA'",
    ),
    Hostile(
        "hook_as_null",
        "A hook that is removed from nothing.",
        experiment("hooks: {ema: null}\n"),
        FIELD,
        "hooks.ema: null removes an entry",
    ),
    Hostile(
        "sets_as_list",
        "Sets that can't be named.",
        experiment(data="{train: {}, evaluation: [{}]}"),
        FIELD,
        "data.evaluation: expected a map",
    ),
    Hostile(
        "groups_as_list",
        "Groups that can't be named.",
        experiment(optimizer="{class_type: torch.optim:SGD, groups: [a]}"),
        FIELD,
        "optimizer.groups: expected a mapping of names",
    ),
    Hostile(
        "misspelt_hook",
        "A hook that doesn't run.",
        experiment("hooks: {a: {class_type: StatMonitor}}\n"),
        REFERENCE,
        "did you mean 'StatsMonitor'?",
    ),
]

_WRONG_PLACES = {
    "optimizer_as_model": ("model", "{class_type: torch.optim:SGD}", "a module, found"),
    "hook_as_model": ("model", "{class_type: EMA}", "a module, found"),
    "hook_config_as_model": ("model", "{config_type: EMAConfig}", "a module, found"),
    "dataset_as_model": ("model", "{class_type: Spirals}", "a module, found"),
    "metric_as_processor": (
        "batch_processor",
        "{class_type: torchmetrics:MeanMetric}",
        "a batch processor, found",
    ),
    "model_as_optimizer": ("optimizer", "{class_type: MLP}", "an optimizer, found"),
    "schedule_as_optimizer": (
        "optimizer",
        "{class_type: torch.optim.lr_scheduler:StepLR}",
        "an optimizer, found",
    ),
    "optimizer_as_schedule": (
        "lr_scheduler",
        "{class_type: torch.optim:SGD}",
        "a lr_scheduler, found",
    ),
    "loss_as_hook": ("hooks", "{a: {class_type: torch.nn:MSELoss}}", "a hook, found"),
    "model_as_hook": ("hooks", "{a: {func: torchvision.models:resnet18}}", "a hook, found"),
    "sink_as_hook": ("hooks", "{a: {class_type: LogSink}}", "a hook, found"),
    "dataset_as_sampler": (
        "data",
        "{train: {dataset: {class_type: Spirals}, sampler: {class_type: Spirals}}}",
        "a sampler, found",
    ),
}

KINDS = [
    Hostile(name, "A part in a wrong place.", experiment(**{field: text}), REFERENCE, says)
    for name, (field, text, says) in _WRONG_PLACES.items()
]

FILES = [*BASES, *FOLDERS, *FIELDS, *KINDS]
