"""The command line ``robo-orchard-lab``.

Rules for a command in ``commands``, which the table in `main` lists with its help line:

- Import torch in functions only: help must not wait for it.
- Return nothing or an exit code. Raise errors: `errors` formats them.
- Print results by `output` to standard output; the log and errors go to standard error.
"""
