"""Checkpoints in a folder: saved durably, verified when loaded, and removed by rules."""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from robo_orchard_lab.pipeline.checkpoint.listing import Listing, RootListing
from robo_orchard_lab.pipeline.checkpoint.manifest import (
    BEST,
    LAST,
    LOCK,
    CheckpointInfo,
    DigestName,
    EachRank,
    PruneDecision,
    ReadLimits,
    SavedState,
    Verification,
    check_digest_name,
    step_dir_name,
    step_from_name,
)
from robo_orchard_lab.pipeline.checkpoint.ranks import Ranks
from robo_orchard_lab.pipeline.checkpoint.retention import (
    Retention,
    clean_leftovers,
    prune,
    put_replacing,
)
from robo_orchard_lab.pipeline.checkpoint.shards import ShareOf
from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import load_on_ranks, verify_checkpoint
from robo_orchard_lab.pipeline.checkpoint.tensor_files import StagingPool
from robo_orchard_lab.pipeline.checkpoint.writer import StagedCheckpoint
from robo_orchard_lab.pipeline.errors import CheckpointError, StoreLockedError
from robo_orchard_lab.pipeline.run.durable import lock_file, make_folder, replace_link

if TYPE_CHECKING:
    from filelock import BaseFileLock

logger = logging.getLogger(__name__)

_MAX_HOLDER_BYTES = 4096


def _lock_root(root: Path) -> BaseFileLock | None:
    """Lock a store's root for this process; return None if the file system has no locks.

    Raises:
        StoreLockedError: another process or store holds the lock; the message names the holder.
        OSError: the lock file can't be written.
    """
    command = shlex.join(sys.argv) if sys.argv and sys.argv[0] else sys.executable
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    holder = f"process {os.getpid()} on {socket.gethostname()} ({command:.1000}), since {since}"
    try:
        lock = lock_file(root / LOCK, holder)
    except BlockingIOError:
        with (root / LOCK).open("rb") as file:
            other = file.read(_MAX_HOLDER_BYTES).decode("utf-8", "replace").strip()
        raise StoreLockedError(
            f"{root} is locked by {other or 'another process'}; stop that process, or save to "
            "another directory"
        ) from None
    if lock is None:
        logger.warning(
            "%s: the file system has no locks; make sure that no other run saves there", root
        )
    return lock


# --- finding ---------------------------------------------------------------------------------
# Which checkpoint of a root is meant.


def find_checkpoint(
    which: int | str | os.PathLike[str], root: Path, listing: Listing, retention: Retention
) -> Path:
    """The path of "last", "best", a step, or what is a path already.

    What is damaged is found as well, since no other may be taken in its place.

    Raises:
        CheckpointError: there is no such one in the root.
    """
    if isinstance(which, int):
        return _of_step(which, root, listing.infos)
    if which == LAST:
        return _last(root, listing)
    if which == BEST:
        return _best(root, listing.infos, retention)
    return Path(which)


def _of_step(step: int, root: Path, infos: Sequence[CheckpointInfo]) -> Path:
    path = root / step_dir_name(step)
    if not os.path.lexists(path):
        steps = ", ".join(str(info.step) for info in infos) or "none"
        raise CheckpointError(f"{root} has no step {step}; it has: {steps}")
    return path


def _last(root: Path, listing: Listing) -> Path:
    """By the serial, unless the link or, without one, the highest step leads to a damaged one."""
    linked = _linked(root / LAST)
    broken = [path for path, _ in listing.broken]
    if linked in broken:
        return linked
    if not listing.infos:
        if broken:
            return broken[-1]
        raise CheckpointError(f"there is no checkpoint in {root}")
    newest = listing.infos[-1].path
    if linked is None:
        return max([newest, *broken], key=lambda path: path.name.zfill(32))
    return newest


def _best(root: Path, infos: Sequence[CheckpointInfo], retention: Retention) -> Path:
    if retention.monitor is not None:
        best = retention.best(infos)
        if not best:
            raise CheckpointError(f"no checkpoint in {root} has the metric {retention.monitor!r}")
        return best[0].path
    linked = _linked(root / BEST)
    if linked is None:
        raise CheckpointError(
            f"{root} does not say which checkpoint is best; give the store a Retention(monitor=...)"
        )
    return linked


def _linked(link: Path) -> Path | None:
    """The checkpoint beside a link that it leads to."""
    with suppress(OSError):
        target = os.readlink(link)
        if step_from_name(target) is not None:
            return link.with_name(target)
    return None


# --- pending save ----------------------------------------------------------------------------
# A checkpoint between its copy and its commit.


class PendingSave:
    """A checkpoint in memory, to be written or dropped. As a context manager, it drops itself."""

    def __init__(
        self, image: StagedCheckpoint, commit: Callable[[StagedCheckpoint], CheckpointInfo]
    ) -> None:
        """``commit`` writes the image; it is released afterwards."""
        self._commit = commit
        self._image: StagedCheckpoint | None = image
        self._step = image.manifest.step

    @property
    def step(self) -> int:
        """The step that it was prepared for."""
        return self._step

    def commit(self) -> CheckpointInfo:
        """Write it, durably, and remove what the retention does not keep: a collective.

        It may be called in another thread than :meth:`CheckpointStore.prepare`, and beside other
        calls to the store. Of several, all ranks commit in the same order.

        Raises:
            CheckpointError: it can't be written, on whichever rank; what there was is still there.
        """
        image, self._image = self._image, None
        if image is None:
            raise CheckpointError("this save was committed or discarded already")
        try:
            return self._commit(image)
        finally:
            image.release()

    def discard(self) -> None:
        """Drop it; afterwards, or after a commit, it does nothing. All ranks do it, or none."""
        if self._image is not None:
            self._image.release()
            self._image = None

    def __enter__(self) -> PendingSave:
        return self

    def __exit__(self, *error: object) -> None:
        self.discard()


class CheckpointStore:
    """The checkpoints in one folder, the root.

    Each is a folder ``step_00001234`` with safetensors, JSON and a manifest, which is either there
    as a whole, on the disk, or not at all; ``last`` and ``best`` are links to one. Whoever saves or
    prunes opens the store first, best as a context manager: a lock keeps others out, and what a
    crash has left is cleaned up. Loading, listing and verifying need no lock.

    With ``ranks``, the calls that say so are collectives: every rank makes them, in the same
    order, and an error on one is an error on all.

    >>> import tempfile, torch
    >>> folder = tempfile.TemporaryDirectory()
    >>> with CheckpointStore(folder.name, retention=Retention(keep_last=2)) as store:
    ...     for step in (10, 20, 30):
    ...         info = store.save(step, {"model": {"w": torch.ones(2)}, "trainer": {"step": step}})
    >>> [info.step for info in store.list()]
    [20, 30]
    >>> store.load("last").parts["trainer"]
    {'step': 30}
    >>> folder.cleanup()
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        digest: DigestName = "xxh3_128",
        retention: Retention | None = None,
        limits: ReadLimits | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Nothing is touched yet.

        Args:
            root: the folder; :meth:`open` makes it.
            digest: verifies what is saved; loading goes by what a checkpoint says.
            retention: what stays when another is saved; by default all.
            limits: what is refused unread, and so is not saved, either.
            ranks: the processes that use this store together; by default this one alone.

        Raises:
            PipelineConfigError: there is no such digest.
        """
        check_digest_name(digest)
        self.root = Path(os.path.abspath(root))
        self.digest = digest
        self.retention = retention or Retention()
        self.limits = limits or ReadLimits()
        self.ranks = ranks or Ranks.alone()
        self._listing = RootListing(self.root, self.limits)
        self._pool = StagingPool(pinned=True)
        self._writing = RLock()
        self._is_open = False
        self._lock: BaseFileLock | None = None
        self._serial = 0

    def open(self) -> CheckpointStore:
        """Make the root, lock it, and clean up after a crash: a collective.

        Raises:
            StoreLockedError: another process writes there, or another store of this one.
            CheckpointError: the root can't be made or written to.
        """
        if self._is_open:
            raise CheckpointError(f"the store of {self.root} is open already")
        self.ranks.run_on_first(f"opening {self.root}", self._open)
        self._is_open = True
        return self

    def close(self) -> None:
        """Wait for a save in another thread, let others write, and give up kept memory."""
        with self._writing:
            self._is_open = False
            self._unlock()
        self._pool.clear()

    def __enter__(self) -> CheckpointStore:
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        parts: Mapping[str, Any],
        rank_parts: Mapping[str, Any] | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> CheckpointInfo:
        """Save, durably: when it returns, all of it is on the disk. A collective.

        A checkpoint of the same step is replaced. Afterwards those are removed that the retention
        does not keep.

        Args:
            step: names the checkpoint.
            parts: of the whole job, by name; what the first rank gives is saved. A mapping of
                names to tensors becomes ``<part>.safetensors`` and nothing else, which
                ``safetensors.torch.load_file`` reads; any other tree (None, bool, int, float, str,
                tensors, lists, tuples, mappings) has a ``<part>.json`` as well. Of a tensor that
                is sharded (a ``DTensor``, also in ``rank_parts``) every rank saves what it has, as
                ``<part>.shard<rank>.safetensors``.
            rank_parts: of this rank.
            metrics: by name; the retention may know one as ``monitor``.
            metadata: plain values, kept in the manifest.

        Raises:
            StateError: something can't be saved; the message names it.
            CheckpointError: it can't be written, on whichever rank; what there was is still there.
        """
        with self.prepare(step, parts, rank_parts, metrics=metrics, metadata=metadata) as pending:
            return pending.commit()

    def prepare(
        self,
        step: int,
        parts: Mapping[str, Any],
        rank_parts: Mapping[str, Any] | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> PendingSave:
        """Copy everything into memory of the store's own, to be written later: a collective.

        The memory is kept from one save to the next. What is given can be changed as soon as this
        returns.

        Args:
            step, parts, rank_parts, metrics, metadata: see :meth:`save`.

        Raises:
            StateError: something can't be saved; the message names it.
        """
        self._check_open()
        made: list[StagedCheckpoint] = []

        def copy() -> None:
            image = StagedCheckpoint(
                step,
                parts,
                rank_parts,
                ranks=self.ranks,
                digest=self.digest,
                pool=self._pool,
                limits=self.limits,
                metrics=metrics,
                metadata=metadata,
            )
            made.append(image)

        try:
            self.ranks.run_on_all(f"saving step {step}", copy)
        except BaseException:
            for image in made:
                image.release()
            raise
        return PendingSave(made[0], self._commit)

    def load(
        self, which: int | str | os.PathLike[str], share_of: ShareOf | None = None
    ) -> SavedState:
        """The state of one checkpoint, verified and on the CPU: a collective.

        Args:
            which: ``"last"``, ``"best"``, a step, or the path of any checkpoint. Another one is
                never taken in its place.
            share_of: what this rank needs of tensors that are the job's, or that several have
                saved in shards; by default all of them.

        Raises:
            CheckpointError: there is no such checkpoint, or not all of it is as it was written.
        """
        path = self.ranks.run_on_first(f"looking for {which!r}", lambda: self._find(which))
        return load_on_ranks(path, self.limits, self.ranks, share_of)

    def load_newest(
        self, share_of: ShareOf | None = None, each_rank: EachRank | None = None
    ) -> SavedState | None:
        """The state of the newest checkpoint that verifies: a collective.

        Args:
            share_of: see :meth:`load`.
            each_rank: see :func:`load_checkpoint`.

        Returns:
            None where there is no checkpoint at all; else :attr:`SavedState.skipped` says which
            did not verify, and why.

        Raises:
            CheckpointError: there are some, and none verifies.
        """
        listing = self.ranks.run_on_first(f"reading {self.root}", self._listing.read)
        skipped: list[tuple[Path, str]] = list(listing.broken)
        for info in reversed(listing.infos):
            try:
                found = load_on_ranks(
                    info.path, self.limits, self.ranks, share_of, each_rank=each_rank
                )
            except CheckpointError as error:
                skipped.append((info.path, str(error)))
                continue
            return replace(found, skipped=tuple(skipped))
        if not skipped:
            return None
        reasons = "\n".join(f"  {reason}" for _, reason in skipped)
        raise CheckpointError(
            f"none of the checkpoints in {self.root} verifies; repair one, or move them away to "
            f"start anew:\n{reasons}"
        )

    def list(self) -> list[CheckpointInfo]:
        """The checkpoints whose manifests are whole, in the order in which they were saved."""
        return self._listing.read().infos

    def verify(self, which: int | str | os.PathLike[str] | None = None) -> Sequence[Verification]:
        """Compare every file of a checkpoint with its digest; by default of all: a collective."""

        def read() -> Sequence[Verification]:
            if which is not None:
                return [verify_checkpoint(self._find(which), self.limits)]
            listing = self._listing.read()
            found = [Verification(path, reason) for path, reason in listing.broken]
            return found + [verify_checkpoint(info.path, self.limits) for info in listing.infos]

        return self.ranks.run_on_first(f"verifying {self.root}", read)

    def prune(self, *, dry_run: bool = False) -> Sequence[PruneDecision]:
        """Remove what the retention does not keep, or say what would be: a collective.

        The newest one that verifies is kept always; to find it, checkpoints are read.

        Raises:
            CheckpointError: the store is not open, which ``dry_run`` does not need.
        """
        if not dry_run:
            self._check_open()

        def decide() -> Sequence[PruneDecision]:
            with self._writing:
                return self._prune(None, dry_run=dry_run)

        return self.ranks.run_on_first(f"pruning {self.root}", decide)

    def _open(self) -> None:
        try:
            make_folder(self.root)
        except FileExistsError as error:
            raise CheckpointError(f"opening {self.root} failed: it is no folder") from error
        self._lock = _lock_root(self.root)
        try:
            self._clean()
            infos = self.list()
            self._serial = max((info.serial for info in infos), default=0)
            self._set_links()
        except BaseException:
            self._unlock()
            raise

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _clean(self) -> None:
        """Unless another run might be writing what looks like leftovers."""
        if self._lock is not None:
            clean_leftovers(self.root, self.limits)

    def _check_open(self) -> None:
        if not self._is_open:
            raise CheckpointError(
                f"the store of {self.root} is not open; use it as in `with CheckpointStore(...) as "
                "store:`, or call open() first"
            )

    def _commit(self, image: StagedCheckpoint) -> CheckpointInfo:
        with self._writing:
            self._check_open()
            info = image.commit(
                self.root / step_dir_name(image.manifest.step),
                self._next_serial,
                lambda temporary: put_replacing(
                    temporary, self.root / step_dir_name(image.manifest.step), self.limits
                ),
                self.ranks.background,
            )
            if self.ranks.index == 0:
                self._tidy(info)
            return info

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def _tidy(self, new: CheckpointInfo) -> None:
        """What follows a save, and is no reason to fail it."""
        try:
            self._set_links()
            self._prune(new, dry_run=False)
            self._clean()
        except (OSError, CheckpointError) as error:
            logger.warning("%s is saved; tidying up after it failed: %s", new.path, error)

    def _prune(self, good: CheckpointInfo | None, *, dry_run: bool) -> Sequence[PruneDecision]:
        listing = self._listing.read()
        decisions = prune(listing, self.retention, self.limits, good=good, dry_run=dry_run)
        if not dry_run and any(decision.removed for decision in decisions):
            self._set_links()  # the best may be gone
        return decisions

    def _find(self, which: int | str | os.PathLike[str]) -> Path:
        return find_checkpoint(which, self.root, self._listing.read(), self.retention)

    def _set_links(self) -> None:
        """Have ``last`` and ``best`` lead to what they say, as far as links can be made here."""
        infos = self.list()
        best = self.retention.best(infos)
        for name, found in ((LAST, infos[-1:]), (BEST, best[:1])):
            link = self.root / name
            try:
                if found:
                    replace_link(link, found[0].path.name)
                elif link.is_symlink() and not link.exists():
                    link.unlink()
            except OSError as error:
                logger.warning("the link %s can't be set: %s", link, error)
