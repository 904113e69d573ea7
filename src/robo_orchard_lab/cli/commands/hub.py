"""Commands ``hub push`` and ``hub pull``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from robo_orchard_core.utils.logging import one_line
from robo_orchard_lab.cli.commands import CommandGroup
from robo_orchard_lab.cli.errors import CommandError, ExitCode
from robo_orchard_lab.cli.experiment_arguments import trust_option
from robo_orchard_lab.cli.output import (
    PROGRAM,
    bytes_text,
    count_text,
    json_option,
    note,
    print_json,
    print_table,
    say,
)
from robo_orchard_lab.cli.sharing import card_fields, card_options, export_folder

if TYPE_CHECKING:
    from robo_orchard_lab.sharing.hub import Transferred
    from robo_orchard_lab.sharing.shareable import SharedFiles

_revision_option = click.option(
    "--revision", metavar="NAME", help="Branch; for a pull also a tag or a commit. Default: main."
)


@click.group("hub", cls=CommandGroup)
def hub() -> None:
    """Push runs to the Hugging Face Hub, and pull them.

    \b
      robo-orchard-lab hub push runs/spirals --repo me/spirals --private
      robo-orchard-lab hub pull me/spirals

    Log in once with `hf auth login`, or set HF_TOKEN.
    """


@hub.command("push")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--repo", required=True, metavar="OWNER/NAME", help="Repository; made if missing.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@_revision_option
@click.option("--best", is_flag=True, help="Push the best checkpoint's model, not the newest's.")
@click.option("--checkpoints", is_flag=True, help="Push the checkpoints as well, to resume.")
@card_options
@click.option("--dry-run", is_flag=True, help="List the files to push; push nothing.")
@trust_option
@json_option
def push(
    run: Path,
    repo: str,
    private: bool,
    revision: str | None,
    best: bool,
    checkpoints: bool,
    dry_run: bool,
    trust: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Push a run: model, model card, experiment file, metrics and report.

    \b
      robo-orchard-lab hub push runs/spirals --repo me/spirals --license apache-2.0
      robo-orchard-lab hub push runs/spirals --repo me/spirals --dry-run

    RUN is the folder of a run, or one of its checkpoints. The model is that of SaveModel
    (pretrained_model/), or else of the newest intact checkpoint. It lies at the top of the
    repository, where `from_pretrained` looks for it. A checkpoint is added where `evaluate` needs
    it, such as for an EMA.

    Never pushed: logs, events, the git diff, host, folders, and files behind links. A file with a
    token or a password is refused. Repeat an interrupted push to
    continue.
    """
    from robo_orchard_lab.report.listing import run_folder
    from robo_orchard_lab.sharing.hub import push as push_files

    folder = run_folder(run)
    _check_not_running(folder)
    with TemporaryDirectory(prefix="export-") as temporary:
        shared, step = _collect(
            run, folder, Path(temporary, "model"), card_fields(options), best, checkpoints, trust
        )
        sizes = shared.sizes()
        for text in shared.notes:
            note(one_line(text))
        if dry_run:
            if as_json:
                print_json({"repo": repo, "files": sizes, "notes": shared.notes})
            else:
                print_table(["file", "size"], [[n, bytes_text(size)] for n, size in sizes.items()])
                say("\nnothing was pushed")
            return
        at = "" if step is None else f" at step {step}"
        message = f"Push the run {folder.resolve().name}{at}"
        with _commands_errors():
            pushed = push_files(shared, repo, private=private, revision=revision, message=message)
    if as_json:
        print_json(_plain(pushed))
    else:
        size = bytes_text(sum(pushed.files.values()))
        say(f"pushed {count_text(len(pushed.files), 'file')} ({size}) to {pushed.url}")
        say(f"  commit  {pushed.commit}")
        say(f"  pull    {PROGRAM} hub pull {shlex.quote(pushed.repo)}")


@hub.command("pull")
@click.argument("repo", metavar="OWNER/NAME")
@click.argument("folder", required=False, type=click.Path(path_type=Path, file_okay=False))
@_revision_option
@json_option
def pull(repo: str, folder: Path | None, revision: str | None, as_json: bool) -> None:
    """Pull a run or a model to a new folder, runs/NAME by default.

    \b
      robo-orchard-lab hub pull me/spirals
      robo-orchard-lab hub pull me/spirals runs/theirs --revision 1a2b3c4

    The files are a stranger's, and data only: code, pickles and pages are not pulled, and the
    report is written from the data. `evaluate` and `train` run code that the experiment file names
    only with --trust. Repeat an interrupted pull to continue.
    """
    from robo_orchard_lab.experiment.run_folder import run_config_file
    from robo_orchard_lab.report.page import REPORT_FILE, render, write
    from robo_orchard_lab.sharing.hub import pull as pull_files

    folder = folder or Path("runs") / repo.rpartition("/")[2]
    with _commands_errors():
        try:
            pulled = pull_files(repo, folder, revision=revision)
        except FileExistsError as error:
            advice = f"name another folder: {PROGRAM} hub pull {shlex.quote(repo)} FOLDER"
            raise CommandError(str(error), advice) from error
    is_run = run_config_file(folder) is not None
    if is_run:
        with suppress(OSError):
            write(folder / REPORT_FILE, render([folder]))
    if as_json:
        print_json({**_plain(pulled), "folder": str(folder), "is_run": is_run})
        return
    size = bytes_text(sum(pulled.files.values()))
    say(f"pulled {count_text(len(pulled.files), 'file')} ({size}) of {pulled.url} to {folder}")
    say(f"  commit    {pulled.commit}")
    if is_run:
        say(f"  evaluate  {PROGRAM} evaluate {shlex.quote(str(folder))}")


def _check_not_running(folder: Path) -> None:
    from robo_orchard_lab.pipeline.errors import StateError
    from robo_orchard_lab.pipeline.run.run_state import read_run_state

    with suppress(FileNotFoundError, StateError):
        state = read_run_state(folder)
        if state.state == "running" and state.process.is_another_running():
            raise CommandError(
                f"the run in {folder} is still running, as process {state.process.pid}",
                "push it when it ends",
                ExitCode.FAILED,
            )


def _collect(
    run: Path,
    folder: Path,
    temporary: Path,
    card: Mapping[str, Any],
    best: bool,
    all_checkpoints: bool,
    trust: tuple[str, ...],
) -> tuple[SharedFiles, int | None]:
    """Return the files to push, and the step of the checkpoint that `evaluate` uses."""
    from robo_orchard_lab.experiment.run_checkpoints import find_checkpoints, list_checkpoints
    from robo_orchard_lab.experiment.run_folder import NoRunError
    from robo_orchard_lab.pipeline.checkpoint.manifest import step_from_name
    from robo_orchard_lab.pipeline.pretrained_folder import CARD_FILE
    from robo_orchard_lab.report.files import Problems
    from robo_orchard_lab.report.story import read_configuration
    from robo_orchard_lab.sharing.export import changed_card, is_evaluated_alike
    from robo_orchard_lab.sharing.shareable import model_folder, shareable_files

    model = model_folder(folder)
    has_model = (model / CARD_FILE).is_file() and not best and run.resolve() == folder.resolve()
    checkpoint, saved = None, []
    try:
        found = find_checkpoints(run)
        checkpoint = found.pick(best=best)
        saved = [info.path for info in list_checkpoints(found.root).infos]
    except NoRunError as error:
        if not has_model:
            error.problem += f", and there is no {model}; add the hook SaveModel to the run"
            raise
    if not has_model:
        assert checkpoint is not None
        model = temporary
        export_folder(run, checkpoint, model, card, trust)
    if all_checkpoints:
        pushed = saved
    else:
        document = read_configuration(folder, Problems()).document
        is_needed = checkpoint is not None and not is_evaluated_alike(model, checkpoint, document)
        pushed = [checkpoint] if is_needed and checkpoint is not None else []
    shared = shareable_files(folder, model, pushed)
    if has_model and card:
        shared.files[CARD_FILE] = changed_card(model / CARD_FILE, card)
    if pushed and not all_checkpoints:
        shared.notes.append(f"{pushed[0].name} is pushed as well: `evaluate` needs it")
    return shared, None if checkpoint is None else step_from_name(checkpoint.resolve().name)


def _plain(done: Transferred) -> dict[str, Any]:
    return {"repo": done.repo, "url": done.url, "commit": done.commit, "files": dict(done.files)}


@contextmanager
def _commands_errors() -> Iterator[None]:
    """Turn a `HubError` into an error of a command."""
    from robo_orchard_lab.sharing.hub import HubError

    try:
        yield
    except HubError as error:
        raise CommandError(error.problem, error.advice, ExitCode.FAILED) from error
