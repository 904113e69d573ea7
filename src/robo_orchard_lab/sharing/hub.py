"""Push of files to the Hugging Face Hub, and pull, by ``huggingface_hub``."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from robo_orchard_core.utils.untrusted_text import path_problem
from robo_orchard_lab.pipeline.model_card import PROJECT
from robo_orchard_lab.pipeline.run.durable import make_folder, remove_folder
from robo_orchard_lab.sharing.shareable import SUFFIXES, SharedFiles

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_MAX_FILES = 10_000
_STALE = ["*.safetensors", "*.safetensors.index.json", "checkpoints/*"]
_ACCEPTED = [f"*{suffix}" for suffix in SUFFIXES]
_REFUSED = [".*", "*/.*"]
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class HubError(RuntimeError):
    """Failure of a push or a pull, with its remedy."""

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.advice = advice


@dataclass(frozen=True)
class Transferred:
    """Result of a push or a pull.

    Attributes:
        repo: Repository, ``owner/name``.
        commit: Commit of the files.
        url: Address of the repository.
        files: Sizes in bytes by path.
    """

    repo: str
    commit: str
    url: str
    files: Mapping[str, int]


def push(
    shared: SharedFiles, repo: str, *, private: bool, revision: str | None, message: str
) -> Transferred:
    """Push files to a repository, which is created if missing.

    Weights and checkpoints in the repository that are not among the files are removed; older
    commits keep them. Repeat an interrupted push: data that the Hub already has is not sent again.

    Raises:
        HubError: The Hub refused the push, or can't be reached.
    """
    api = _api()
    with _explained(repo, revision), TemporaryDirectory(prefix="push-") as staging:
        for name, file in shared.files.items():
            target = Path(staging, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(file, bytes):
                target.write_bytes(file)
            else:  # without a copy; `shareable_files` has checked that the file is regular
                os.symlink(file.absolute(), target)
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        before = api.model_info(repo, revision=revision).sha
        pushed = api.upload_folder(
            repo_id=repo,
            folder_path=staging,
            revision=revision,
            commit_message=message,
            parent_commit=before,
            delete_patterns=_STALE,
        )
    return Transferred(repo, pushed.oid, f"{api.endpoint}/{repo}", shared.sizes())


def pull(repo: str, folder: Path, *, revision: str | None) -> Transferred:
    """Pull the data files of a repository to a new folder.

    Code, pickles, HTML and hidden files are not pulled. The folder appears when it is complete.
    Repeat an interrupted pull: complete files are not pulled again.

    Raises:
        HubError: The Hub refused the pull or can't be reached, or a file is not acceptable.
        FileExistsError: The folder exists.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} already exists")
    api = _api()
    with _explained(repo, revision):
        info = api.model_info(repo, revision=revision, files_metadata=True)
        files = _accepted(repo, info.siblings or [])
        commit = info.sha or ""
        partial = folder.with_name(f".{folder.name}.{commit[:12]}.partial")
        make_folder(partial.absolute().parent)
        _check_room(partial, sum(file.size or 0 for file in files.values()))
        api.snapshot_download(
            repo,
            revision=commit,
            local_dir=partial,
            allow_patterns=_ACCEPTED,
            ignore_patterns=_REFUSED,
        )
        sizes = {name: _checked(partial / name, file) for name, file in sorted(files.items())}
    remove_folder(partial / ".cache")  # of huggingface_hub
    if folder.is_dir():
        folder.rmdir()
    os.rename(partial, folder)
    return Transferred(repo, commit, f"{api.endpoint}/{repo}", sizes)


def _api() -> HfApi:
    from huggingface_hub import HfApi  # comes with accelerate; costs 0.3 s

    for client in ("httpx", "httpx2"):  # log each request
        logging.getLogger(client).setLevel(logging.WARNING)
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name=PROJECT)


def _accepted(repo: str, siblings: list[Any]) -> dict[str, Any]:
    """Return the files to pull by name, or refuse names that may lead out of the folder."""
    if len(siblings) > _MAX_FILES:
        raise HubError(f"{repo} has {len(siblings):,} files, more than {_MAX_FILES:,}")
    found = {}
    for file in siblings:
        name = file.rfilename
        if problem := path_problem(name):
            raise HubError(f"{repo} has a file {name!r}, whose name {problem}; nothing was pulled")
        if any(fnmatchcase(name, p) for p in _ACCEPTED) and not any(
            fnmatchcase(name, p) for p in _REFUSED
        ):
            found[name] = file
    if not found:
        raise HubError(
            f"{repo} has no files to pull: expected {', '.join(SUFFIXES)}",
            "convert weights to safetensors in a script that you trust",
        )
    return found


def _check_room(path: Path, size: int) -> None:
    free = shutil.disk_usage(path.absolute().parent).free
    if size > free:
        raise HubError(
            f"{path.absolute().parent} has no room: {size:,} bytes needed, {free:,} free",
            "free space, or name another folder",
        )


def _checked(path: Path, file: Any) -> int:
    """Return the size of a pulled file after comparing size and SHA-256 with the Hub's."""
    if path.is_symlink() or not path.is_file():
        raise HubError(f"{path} was not pulled", "run the command again")
    size = path.stat().st_size
    is_intact = file.size is None or size == file.size
    if is_intact and file.lfs is not None:
        with path.open("rb") as opened:
            is_intact = hashlib.file_digest(opened, "sha256").hexdigest() == file.lfs.sha256
    if not is_intact:
        path.unlink()
        raise HubError(
            f"{file.rfilename} differs from the file of the Hub, and was removed",
            "run the command again",
        )
    return size


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn errors of ``huggingface_hub`` into a `HubError` with a remedy."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        found = _explain(error, repo, revision)
        if found is None:
            raise
        raise found from error


def _explain(error: Exception, repo: str, revision: str | None) -> HubError | None:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None)
    said = f": {said}" if said else ""
    match error:
        case errors.HFValidationError():
            return HubError(
                f"{repo!r} is no name of a repository", "expected owner/name, such as me/spirals"
            )
        case errors.LocalTokenNotFoundError():
            return HubError("the Hub requires a login", _LOGIN)
        case errors.OfflineModeIsEnabled():
            return HubError("HF_HUB_OFFLINE is set", "unset it")
        case errors.GatedRepoError():
            return HubError(f"{repo} is gated{said}", "request access on its page, and log in")
        case errors.RepositoryNotFoundError():
            return HubError(
                f"there is no repository {repo}, or it is private",
                f"check the name; for a private repository, {_LOGIN}",
            )
        case errors.RevisionNotFoundError():
            return HubError(
                f"{repo} has no revision {revision!r}", "pass a branch, a tag or a commit"
            )
    if status == 401:
        return HubError(f"the Hub requires a login{said}", _LOGIN)
    if status == 403:
        return HubError(
            f"the Hub refused access to {repo}{said}",
            "use a token with write access to the repository's owner, and check the name",
        )
    if status in (409, 412):
        return HubError(
            f"{repo} was changed by another push at the same time{said}",
            "run the command again; data that was sent is not sent again",
        )
    if status is not None:
        return HubError(f"the Hub answered with status {status}{said}", "run the command again")
    is_cut = isinstance(error, errors.LocalEntryNotFoundError | ConnectionError | TimeoutError)
    root = type(error).__module__.partition(".")[0]
    if is_cut or root in ("httpx", "httpx2", "httpcore", "requests", "urllib3"):
        address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        return HubError(
            f"{address} can't be reached, or the connection was cut",
            "check the network, and run the command again: it continues",
        )
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return _explain(error.__cause__, repo, revision)  # of one file
    return None
