"""``completion``: what has a shell complete commands, options and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from robo_orchard_lab.cli.lazy_group import Command
from robo_orchard_lab.cli.output import COMPLETE_VARIABLE, PROGRAM, say


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print what completes commands, options, fields, hooks and files in a shell.

    \b
    For this session:
      bash  eval "$(robo-orchard-lab completion bash)"
      zsh   eval "$(robo-orchard-lab completion zsh)"
      fish  robo-orchard-lab completion fish | source
    For all sessions, put that line into ~/.bashrc, ~/.zshrc (behind compinit), or
    ~/.config/fish/config.fish.
    """
    kind = get_completion_class(shell)
    assert kind is not None  # it is one of click's
    # The template alone: click's own rendering starts a bash to look at its version.
    made = kind(None, {}, PROGRAM, COMPLETE_VARIABLE)  # type: ignore[arg-type]  # it is not asked
    say(kind.source_template % made.source_vars())
