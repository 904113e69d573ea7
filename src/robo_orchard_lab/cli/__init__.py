"""The command line ``robo-orchard-lab``.

A command is a module with a ``command``, which `cli.main` names in its list, with the line that
``--help`` shows for it; so it is imported when somebody asks for it, and no other one is::

    # cli/commands/greet.py, listed as "greet": ("Say hello.", f"{_MODULES}.greet")
    @click.command("greet", cls=Command)
    @click.argument("name")
    @json_option
    def command(name: str, as_json: bool) -> None:
        '''Say hello to NAME.'''
        print_json({"hello": name}) if as_json else say(f"hello, {name}")

- `commands.Command` of `cli.lazy_group` brings ``--debug``; `ExperimentCommand` of
  `cli.experiment_arguments` brings ``--trust`` and the overrides as well.
- What imports torch is imported in the function that needs it: help is to come at once.
- A command returns nothing, or the process's exit code. What goes wrong is raised: `cli.errors`
  says it in a line or two, and with which code the process ends.
- Standard output has what was asked for, by `cli.output`; the log and errors go to standard error.
"""
