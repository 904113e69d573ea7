"""``config``: experiment files, looked at and begun."""

from robo_orchard_lab.cli.lazy_group import LazyGroup

command = LazyGroup(
    "config",
    {
        "Commands": {
            "init": ("Write a commented file to begin with.", f"{__name__}.init"),
            "check": ("Check files, and tell all that is wrong.", f"{__name__}.check"),
            "show": ("Show all that a file comes to, and from where.", f"{__name__}.show"),
            "diff": ("Show what two files differ in.", f"{__name__}.diff"),
        }
    },
    "Begin, check, show and compare the files of experiments.",
)
