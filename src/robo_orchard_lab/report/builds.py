"""Data of pages, made by other processes when the files of a run changed."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import islice
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any
from urllib.parse import quote

from xxhash import xxh3_128_hexdigest

from robo_orchard_lab.experiment.run_folder import CONFIG_FILE, RUN_STATE
from robo_orchard_lab.report.files import Problems, read_object, text
from robo_orchard_lab.report.listing import RunSummary, find_runs, is_run, summarize
from robo_orchard_lab.report.page import REPORT_FILE, embeddable, read_document
from robo_orchard_lab.report.position import STAGE_FILE
from robo_orchard_lab.report.series import number
from robo_orchard_lab.report.story import read_configuration, read_verdict

_PROCESSES = 2
_NICENESS = 10
_MAX_KEPT = 8  # documents in memory; each has up to 24 MiB
_SHARE = 10  # a document that takes a second to make is made every 10 s at most
_SHORTEST_S, _LONGEST_S = 1.0, 60.0
_MAX_ENTRIES = 10_000
_FOLDERS = ("", "media", "starts", "checkpoints")

Signature = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """Data of a page.

    Attributes:
        title: title of the page.
        data: JSON that HTML can embed.
        tag: digest of the data, for ``ETag``.
    """

    title: str
    data: str
    tag: str


@dataclass(slots=True)
class _Entry:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    document: Document | None = None
    signature: Signature | None = None
    next_at: float = 0.0


class Builds:
    """Documents of the runs in a folder; each is made again when its run changed.

    Other processes with a low priority read the runs, so that the caller's event loop is never
    busy. A document is not made again before ten times the time it took, at most a minute.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._pool: ProcessPoolExecutor | None = None
        self._others = {*active_children()}

    async def run(self, path: str) -> Document | None:
        """Return the document of a run by its path in the folder; None if there is no run."""
        run = await asyncio.to_thread(find_inside, self.folder, path)
        if run is None:
            return None
        return await self._current(_read_run, run, lambda: signature(run))

    async def runs(self) -> Document:
        """Return the document of the list of runs."""
        return await self._current(_read_list, self.folder, lambda: (time.monotonic(),))

    def close(self) -> None:
        """End the processes that read the runs."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in {*active_children()} - self._others:
                process.terminate()

    async def _current(
        self,
        read: Callable[[Path], tuple[str, str]],
        folder: Path,
        sign: Callable[[], Signature],
    ) -> Document:
        key = read, folder
        entry = self._entries.setdefault(key, _Entry())
        self._entries.move_to_end(key)
        while len(self._entries) > _MAX_KEPT:
            self._entries.popitem(last=False)
        if entry.document is not None and (entry.lock.locked() or entry.next_at > time.monotonic()):
            return entry.document
        async with entry.lock:
            found = await asyncio.to_thread(sign)
            if entry.document is None or entry.signature != found:
                began_at = time.monotonic()
                title, data = await self._call(read, folder)
                took = time.monotonic() - began_at
                wait = min(_LONGEST_S, max(_SHORTEST_S, _SHARE * took))
                entry.next_at, entry.signature = time.monotonic() + wait, found
                entry.document = Document(title, data, f'"{xxh3_128_hexdigest(data.encode())}"')
            return entry.document

    async def _call(self, read: Callable[[Path], tuple[str, str]], folder: Path) -> tuple[str, str]:
        loop, pool = asyncio.get_running_loop(), self._started()
        try:
            return await loop.run_in_executor(pool, read, folder)
        except BrokenProcessPool:  # killed, as by the system without memory
            if self._pool is pool:
                self._pool = None
            return await loop.run_in_executor(self._started(), read, folder)

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                _PROCESSES, mp_context=get_context("spawn"), initializer=_begin_process
            )
        return self._pool


def find_inside(folder: Path, path: str) -> Path | None:
    """Return the run at a path in a folder; None without a run, and if a link is on the way."""
    root = os.path.realpath(folder)
    found = os.path.join(root, *filter(None, path.split("/")))
    try:
        is_inside = os.path.realpath(found) == found  # without "..", too
        return Path(found) if is_inside and is_run(Path(found)) else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def signature(run: Path, *, with_stage: bool = False) -> Signature:
    """Return a value that changes when files of a run change, or when its process dies."""
    found = []
    for inner in _FOLDERS:
        with suppress(OSError), os.scandir(run / inner) as entries:
            for entry in islice(entries, _MAX_ENTRIES):
                is_left_out = entry.name == REPORT_FILE or entry.name.startswith(".")
                if is_left_out or (entry.name == STAGE_FILE and not with_stage):
                    continue
                at = entry.stat(follow_symlinks=False)
                found.append((inner, entry.name, at.st_mtime_ns, at.st_size, at.st_ino))
    with suppress(OSError):
        configuration = next((each for each in found if each[:2] == ("", CONFIG_FILE)), None)
        at = _metrics_file(run, configuration).lstat()
        found.append(("", "", at.st_mtime_ns, at.st_size, at.st_ino))
    state = read_object(run / RUN_STATE, Problems())
    return read_verdict(run, state)["state"], *sorted(found)


@lru_cache(5000)
def _metrics_file(run: Path, configuration: Signature | None) -> Path:
    """Return the metrics file of a run; parsing its configuration costs milliseconds."""
    return read_configuration(run, Problems()).metrics_file(run)


# --- in other processes ----------------------------------------------------------------------

_summaries: dict[Path, tuple[Signature, RunSummary]] = {}


def _begin_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the server, which ends this process
    with suppress(OSError, AttributeError):
        os.nice(_NICENESS)
    threading.Thread(target=_end_with_server, daemon=True).start()


def _end_with_server() -> None:
    """End this process when the server was killed: a pool's process would wait for ever."""
    server = parent_process()
    if server is not None:
        server.join()
        os._exit(1)


def _read_run(folder: Path) -> tuple[str, str]:
    return read_document([folder])


def _read_list(root: Path) -> tuple[str, str]:
    """Return title and data of the list of runs, the newest start first."""
    known = {run: _summary(run) for run in find_runs(root)}
    for gone in _summaries.keys() - known:
        del _summaries[gone]
    found = sorted(known.values(), key=lambda run: run.started_at or "", reverse=True)
    return "Runs", embeddable({"folder": text(str(root)), "runs": [_row(root, r) for r in found]})


def _summary(run: Path) -> RunSummary:
    now = signature(run, with_stage=True)
    before = _summaries.get(run)
    if before is None or before[0] != now:
        before = _summaries[run] = now, summarize(run)
    return before[1]


def _row(root: Path, run: RunSummary) -> dict[str, Any]:
    path = run.path.relative_to(root).as_posix()
    best = None if run.best is None else number(run.best)
    return {
        **asdict(run),
        "path": None,
        "name": text(root.name if path == "." else path, limit=500),
        "link": "" if path == "." else quote(os.fsencode(path)),
        "metric": text(run.metric, limit=200),
        "best": best,
        "problems": [text(problem, limit=300) for problem in run.problems[:5]],
    }
