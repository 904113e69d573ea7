"""The command line ``robo-orchard-lab``.

- `main`: the process around a command: arguments, log, signals, exit codes.
- `commands`: the commands, one module for each group, imported when a command is used.
- `experiment_arguments`: any field of an experiment as an option.
- `training`: start and report of a training run.
- `errors`, `output`: lines for errors; text, tables and JSON.

Rules for a command, as in this module ``cli/commands/greet.py``, which the table in `main` lists as
``"greet": ("Print a greeting.", "robo_orchard_lab.cli.commands.greet:greet")``::

    @click.command(cls=Command)
    @click.argument("name")
    @json_option
    def greet(name: str, as_json: bool) -> None:
        '''Print a greeting for NAME.'''
        print_json({"hello": name}) if as_json else say(f"hello, {name}")

- Import torch in functions only: help must not wait for it.
- Return nothing or an exit code. Raise errors: `errors` formats them.
- Print results by `output` to standard output; the log and errors go to standard error.
"""
