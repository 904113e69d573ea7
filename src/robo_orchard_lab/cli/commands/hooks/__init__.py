"""``hooks``: what there is, and what runs in an experiment."""

from robo_orchard_lab.cli.lazy_group import LazyGroup

command = LazyGroup(
    "hooks",
    {
        "Commands": {
            "list": ("List the built-in hooks.", f"{__name__}.list"),
            "show": ("Show a hook's fields, and what to write in a file.", f"{__name__}.show"),
            "plan": ("Show which hooks run for a file, in which order.", f"{__name__}.plan"),
        }
    },
    "Look at the hooks that there are, and at those that run in an experiment.",
)
