"""``checkpoint``: what is saved of a run, and what is done with it."""

from robo_orchard_lab.cli.lazy_group import LazyGroup

_HERE = "robo_orchard_lab.cli.commands.checkpoint"

command = LazyGroup(
    "checkpoint",
    {
        "Commands": {
            "list": ("List the checkpoints of a run.", f"{_HERE}.list"),
            "show": ("Show what is in a checkpoint.", f"{_HERE}.show"),
            "verify": ("Compare files with what was written.", f"{_HERE}.verify"),
            "export": ("Write the weights as one safetensors file.", f"{_HERE}.export"),
            "prune": ("Remove checkpoints that are not to be kept.", f"{_HERE}.prune"),
        }
    },
    """Look at the checkpoints of a run, verify, export and remove them.

    PATH is the folder of a run, the folder of its checkpoints, or one checkpoint. Nothing of what
    they say is imported or run, so that those of a stranger are safe to look at.
    """,
)
