"""Command ``view``."""

from __future__ import annotations

import secrets
import socket
import sys
from pathlib import Path

import click

from robo_orchard_lab.cli.commands import Command
from robo_orchard_lab.cli.errors import CommandError, ExitCode
from robo_orchard_lab.cli.output import PROGRAM, say

_ADDRESS = "127.0.0.1"
_TOKEN_BYTES = 32


@click.command("view", cls=Command)
@click.argument("folder", default="runs", type=click.Path(path_type=Path))
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default="a free port",
    help="Port of the server.",
)
def view(folder: Path, port: int) -> None:
    """Show the reports of the runs in FOLDER (default: runs) in a browser, and keep them current.

    \b
      robo-orchard-lab view
      robo-orchard-lab view runs --port 8765

    Prints the address: only who knows it, on this machine, can read the pages. The server reads
    runs and changes nothing. A page of a run in progress shows new values within seconds. Ctrl-C
    ends the server. From another machine: `ssh -L PORT:127.0.0.1:PORT HOST`.
    """
    if not folder.is_dir():
        raise CommandError(f"there is no folder {folder}", f"name one: {PROGRAM} view FOLDER")
    try:
        import uvicorn

        from robo_orchard_lab.report.server import make_app
    except ImportError as error:
        raise CommandError(
            "view needs starlette and uvicorn",
            'pip install "robo-orchard-hooks[viewer]"',
            ExitCode.FAILED,
        ) from error
    listening = _listen(port)
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    config = uvicorn.Config(
        make_app(folder.resolve(), token),
        log_level="warning",
        access_log=False,  # its lines have the token
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=1,
    )
    try:
        say(f"http://{_ADDRESS}:{listening.getsockname()[1]}/{token}/")
        say("Ctrl-C ends the server.")
        sys.stdout.flush()
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        raise SystemExit(ExitCode.INTERRUPTED) from None
    finally:
        listening.close()


def _listen(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((_ADDRESS, port))
        listening.listen()  # before the address is printed; early requests wait
    except OSError as error:
        listening.close()
        raise CommandError(
            f"port {port} can't be used: {error.strerror}",
            f"leave --port out for a free one, or name another: {PROGRAM} view --port PORT",
            ExitCode.FAILED,
        ) from error
    return listening
