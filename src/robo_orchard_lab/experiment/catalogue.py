"""What an experiment's file may name without further trust.

Whoever sends a file chooses among these classes and functions, and all of their arguments. So
only that is listed of which no argument, whatever it is, and no call that a run makes can

- run code that the file brings along, or that isn't listed or trusted itself,
- unpickle anything, or take archives apart,
- download anything, but the weights that torchvision's makers publish (from their host, with
  their digest),
- write anywhere but where a path of ours is held to the run's folder.

That leaves out, among others, `torch.load` and everything in `torch.utils`, but loaders, samplers
and datasets of datasets; torchvision's datasets that download or unpickle (MNIST, CIFAR10);
metrics that fetch networks or tokenizers (FID, LPIPS, BERTScore); what builds networks of several
processes. Who needs one of them trusts it by name, as in
``--trust torchvision.datasets.mnist:MNIST``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from robo_orchard_core.utils.config.document import Plain
from robo_orchard_core.utils.config.errors import Path
from robo_orchard_core.utils.config.parts import PART_KEYS
from robo_orchard_lab.experiment.catalogued_names import (
    ALSO_IN_TORCHMETRICS,
    OURS,
    TORCH,
    TORCHMETRICS,
    TORCHVISION,
)


def _definitions(table: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Public module, name and definition of each entry."""
    for public, modules in table.items():
        for module, names in modules.items():
            defined_in = f"{public}.{module}" if module else public
            for name in names.split():
                yield public, name, f"{defined_in}:{name}"


def _catalogue() -> dict[str, str]:
    catalogue: dict[str, str] = {}
    for table in (OURS, TORCH, TORCHVISION, TORCHMETRICS):
        for public, name, definition in _definitions(table):
            if table is OURS:
                catalogue[name] = definition
            catalogue[f"{public}:{name}"] = catalogue[definition] = definition
            if table is TORCHMETRICS and name in _ALSO_IN_TORCHMETRICS:
                catalogue[f"torchmetrics:{name}"] = definition
    return catalogue


_ALSO_IN_TORCHMETRICS = frozenset(ALSO_IN_TORCHMETRICS.split())

CATALOGUE: dict[str, str] = _catalogue()
"""From each name that files may use for a class or function to the place where it is defined.

These are a short name (``StatsMonitor``, for ours alone), the name that people import it by
(``torch.optim:SGD``), and the place itself (``torch.optim.sgd:SGD``).
"""

CATALOGUED = frozenset(CATALOGUE.values())
"""The places."""


_KINDS = {
    "robo_orchard_lab.pipeline.hooks": "hook",
    "robo_orchard_lab.pipeline.sinks": "sink",
    "robo_orchard_lab.pipeline": "batch processor",
    "robo_orchard_lab.experiment.samples:MLP": "module",
    "robo_orchard_lab.experiment.samples:Spirals": "dataset",
    "torch.optim": "optimizer",
    "torch.optim.lr_scheduler": "schedule",
    "torch.optim.swa_utils": "schedule",
    "torch.nn": "module",
    "torch.utils.data.dataloader": "loader",
    "torch.utils.data.dataset": "dataset",
    "torch.utils.data.sampler": "sampler",
    "torchvision": "module",
    "torchvision.datasets": "dataset",
    "torchmetrics": "module",  # each metric is one
}


def kind_of(definition: str) -> str | None:
    """What an entry of the catalogue is, or makes; None for other code.

    >>> kind_of("torch.optim.sgd:SGD"), kind_of("torchvision.models.resnet:resnet18")
    ('optimizer', 'module')
    """
    if definition not in CATALOGUED:
        return None
    place = definition
    while place not in _KINDS:
        place = place.rpartition(":" if ":" in place else ".")[0]
    return _KINDS[place]


def named(reference: str) -> str:
    """The place where it is defined; the reference itself where the catalogue doesn't have it.

    >>> named("StatsMonitor")
    'robo_orchard_lab.pipeline.hooks.stats_monitor:StatsMonitor'
    >>> named("torch.optim:SGD"), named("my_team.models:Net")
    ('torch.optim.sgd:SGD', 'my_team.models:Net')
    """
    return CATALOGUE.get(reference, reference)


def nearest(reference: str) -> str | None:
    """The name in the catalogue that is most like a reference, where one is very like it.

    >>> nearest("StatMonitor"), nearest("torch.optim:SDG"), nearest("AdmW"), nearest("os:system")
    ('StatsMonitor', 'torch.optim:SGD', 'torch.optim:AdamW', None)
    """
    # Without a module, whatever a module of the catalogue has under such a name.
    known = CATALOGUE if ":" in reference else _PUBLIC
    near = difflib.get_close_matches(reference, known, n=1, cutoff=0.85)
    return (near[0] if ":" in reference else _PUBLIC[near[0]]) if near else None


_PUBLIC = {name.rpartition(":")[2]: name for name in reversed(CATALOGUE)}


def with_definitions(value: Plain, path: Path = ()) -> Plain:
    """The value with the places where code is defined for the other names that it has.

    Args:
        value: Of a document.
        path: Where it is there; only ``class_type``, ``func`` and ``config_type`` hold short names.
    """
    if isinstance(value, dict):
        return {key: with_definitions(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [with_definitions(item, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, str) and (":" in value or (path and path[-1] in PART_KEYS)):
        return named(value)
    return value
