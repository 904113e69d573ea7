"""Store of checkpoints: durable saves, verified loads, retention.

:class:`CheckpointStore` is the entry point. A save has two phases: :meth:`~CheckpointStore.prepare`
copies the state into staging buffers, and ``commit`` of the returned ``PendingSave`` writes it.
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from robo_orchard_lab.pipeline.checkpoint.listing import Listing, RootListing, check_step
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
from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import (
    load_checkpoint,
    verify_checkpoint,
)
from robo_orchard_lab.pipeline.checkpoint.tensor_files import StagingPool
from robo_orchard_lab.pipeline.checkpoint.writer import FiniteCheck, PendingSave, StagedCheckpoint
from robo_orchard_lab.pipeline.errors import CheckpointError, StoreLockedError
from robo_orchard_lab.pipeline.progress import MAX_COUNT
from robo_orchard_lab.pipeline.run.durable import lock_file, make_folder, replace_link

if TYPE_CHECKING:
    from filelock import BaseFileLock

logger = logging.getLogger(__name__)

_MAX_HOLDER_BYTES = 4096
_SPARE_SERIALS = 2**40  # of an opened root; more than a run can save


class CheckpointStore:
    """Checkpoints of one run in a root directory.

    Each checkpoint is a directory ``step_00001234`` of safetensors and JSON files and a manifest.
    It appears on the disk complete or not at all. ``last`` and ``best`` are links to checkpoints.

    Saving and pruning require an open store, best as a context manager: it locks the root and
    cleans up after a crash. Loading, listing and verifying need no lock.

    With ``ranks``, methods marked as collectives are called by every rank in the same order. An
    error on one rank is raised on all ranks.

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
        """Validate and store the arguments, without touching the disk.

        Args:
            root: directory of the checkpoints; :meth:`open` creates it.
            digest: digest of saved files. Loading uses the digest that the manifest names.
            retention: rules for keeping checkpoints after a save; by default all are kept.
            limits: sizes that are refused before reading, and refused when saving.
            ranks: processes that share the store; by default this process alone.

        Raises:
            PipelineConfigError: the digest is unknown.
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
        self._healthy: CheckpointInfo | None = None  # the newest that this store has saved

    def open(self) -> CheckpointStore:
        """Create and lock the root, and clean up after a crash. A collective.

        Raises:
            StoreLockedError: another process or store holds the lock.
            CheckpointError: the root can't be created or written.
        """
        if self._is_open:
            raise CheckpointError(f"the store of {self.root} is open already")
        self.ranks.run_on_first(f"opening {self.root}", self._open)
        self._is_open = True
        return self

    def close(self) -> None:
        """Wait for a save in another thread, release the lock, and free the staging buffers."""
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
        finite: FiniteCheck | None = None,
    ) -> CheckpointInfo:
        """Save a checkpoint durably, then apply the retention. A collective.

        A checkpoint of the same step is replaced.

        Args:
            step: step that names the checkpoint.
            parts: state of the job, by part; the first rank's values are saved. A mapping of names
                to tensors becomes ``<part>.safetensors``, readable by
                ``safetensors.torch.load_file``. Any other tree (None, bool, int, float, str,
                tensors, lists, tuples, mappings) also gets a ``<part>.json``. Each rank saves its
                shard of a ``DTensor``, also in ``rank_parts``, as
                ``<part>.shard<rank>.safetensors``.
            rank_parts: state of this rank, by part.
            metrics: values by name; :attr:`Retention.monitor` may name one.
            metadata: plain values for the manifest.
            finite: tensors that should be finite, for :attr:`CheckpointInfo.non_finite`.

        Raises:
            StateError: a value can't be saved; the message names the value.
            CheckpointError: some rank can't write; the previous checkpoint is unchanged.
        """
        with self.prepare(
            step, parts, rank_parts, metrics=metrics, metadata=metadata, finite=finite
        ) as pending:
            return pending.commit()

    def prepare(
        self,
        step: int,
        parts: Mapping[str, Any],
        rank_parts: Mapping[str, Any] | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        finite: FiniteCheck | None = None,
    ) -> PendingSave:
        """Copy the state into staging buffers, to be written later; see :meth:`save`. A collective.

        The caller may change the state as soon as this returns. Later saves reuse the buffers.

        Raises:
            StateError: a value can't be saved; the message names the value.
        """
        self._check_open()
        made: list[StagedCheckpoint] = []

        def copy() -> None:
            staged = self._stage(
                step, parts, rank_parts, metrics=metrics, metadata=metadata, finite=finite
            )
            made.append(staged)
            staged.copy()

        try:
            self.ranks.run_on_all(f"saving step {step}", copy)
        except BaseException:
            for staged in made:
                staged.release()
            raise
        return PendingSave(made[0], self._commit)

    def measure(
        self, step: int, parts: Mapping[str, Any], rank_parts: Mapping[str, Any] | None = None
    ) -> int:
        """Encode a state as :meth:`save` does; return the size of this rank's files in bytes.

        Nothing is copied or written.

        Raises:
            StateError: a value can't be saved; the message names the value.
        """
        return self._stage(step, parts, rank_parts).size

    def _stage(
        self,
        step: int,
        parts: Mapping[str, Any],
        rank_parts: Mapping[str, Any] | None,
        **described: Any,
    ) -> StagedCheckpoint:
        return StagedCheckpoint(
            step,
            parts,
            rank_parts,
            ranks=self.ranks,
            digest=self.digest,
            pool=self._pool,
            limits=self.limits,
            **described,
        )

    def load(
        self, which: int | str | os.PathLike[str], share_of: ShareOf | None = None
    ) -> SavedState:
        """Verify and load a checkpoint to the CPU, without fallback. A collective.

        Args:
            which: ``"last"``, ``"best"``, a step, or the path of any checkpoint.
            share_of: selects this rank's share of job tensors and of sharded tensors; by default
                complete tensors.

        Raises:
            CheckpointError: the checkpoint does not exist or does not verify.
        """

        def find() -> Path:
            path = self._find(which)
            if problem := dict(self._listing.read().broken).get(path):
                raise CheckpointError(problem)
            return path

        path = self.ranks.run_on_first(f"looking for {which!r}", find)
        return self._load(path, share_of)

    def load_newest(
        self, share_of: ShareOf | None = None, each_rank: EachRank | None = None
    ) -> SavedState | None:
        """Load the newest intact and healthy checkpoint. A collective.

        ``share_of`` and ``each_rank`` are those of :func:`load_checkpoint`.

        Returns:
            The state, with the damaged and the non-finite newer checkpoints in
            :attr:`SavedState.skipped`; None if the root has no checkpoint.

        Raises:
            CheckpointError: the root has checkpoints, but none that verifies is healthy.
        """
        listing = self.ranks.run_on_first(f"reading {self.root}", self._listing.read)
        skipped: list[tuple[Path, str]] = list(listing.broken)
        for info in reversed(listing.infos):
            if info.poison:
                skipped.append((info.path, f"{info.path} {info.poison}"))
                continue
            try:
                found = self._load(info.path, share_of, each_rank)
            except CheckpointError as error:
                skipped.append((info.path, str(error)))
                continue
            return replace(found, skipped=tuple(skipped))
        if not skipped:
            return None
        reasons = "\n".join(f"  {reason}" for _, reason in skipped)
        raise CheckpointError(
            f"none of the checkpoints in {self.root} verifies with finite weights and optimizer "
            "state; repair one, resume from the path of a non-finite one, or move all of "
            f"them to another directory to start from scratch:\n{reasons}"
        )

    def list(self) -> list[CheckpointInfo]:
        """Return the checkpoints with a valid manifest, in the order of their saves."""
        return self._listing.read().infos

    def verify(self, which: int | str | os.PathLike[str] | None = None) -> Sequence[Verification]:
        """Compare all files of one checkpoint, or of all, with their digests. A collective."""

        def read() -> Sequence[Verification]:
            if which is not None:
                return [verify_checkpoint(self._find(which), self.limits)]
            listing = self._listing.read()
            found = [Verification(path, reason) for path, reason in listing.broken]
            return found + [verify_checkpoint(info.path, self.limits) for info in listing.infos]

        return self.ranks.run_on_first(f"verifying {self.root}", read)

    def prune(self, *, dry_run: bool = False) -> Sequence[PruneDecision]:
        """Remove checkpoints beyond the retention. A collective.

        The newest healthy checkpoint that verifies is always kept. If this store has not saved it,
        it is found by reading checkpoints. A dry run only decides, also without an open store.

        Raises:
            CheckpointError: the store is not open.
        """
        if not dry_run:
            self._check_open()

        def decide() -> Sequence[PruneDecision]:
            with self._writing:
                return self._prune(dry_run=dry_run)

        return self.ranks.run_on_first(f"pruning {self.root}", decide)

    def _load(
        self, path: Path, share_of: ShareOf | None, each_rank: EachRank | None = None
    ) -> SavedState:
        state = load_checkpoint(
            path, limits=self.limits, ranks=self.ranks, share_of=share_of, each_rank=each_rank
        )
        check_step(path, state.info.step)
        return state

    def _open(self) -> None:
        try:
            make_folder(self.root)
        except NotADirectoryError as error:
            raise CheckpointError(f"opening {self.root} failed: not a directory") from error
        self._lock = _lock_root(self.root)
        try:
            self._clean()
            infos = self.list()
            if infos and infos[-1].serial > MAX_COUNT - _SPARE_SERIALS:
                raise CheckpointError(
                    f"{infos[-1].path} claims to be save {infos[-1].serial} of its run, which "
                    "leaves no number for later saves; move it to another directory"
                )
            self._serial = infos[-1].serial if infos else 0
            self._set_links()
        except BaseException:
            self._unlock()
            raise

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _clean(self) -> None:
        if self._lock is not None:  # else another run may be writing the apparent leftovers
            clean_leftovers(self.root, self.limits)

    def _check_open(self) -> None:
        if not self._is_open:
            raise CheckpointError(
                f"the store of {self.root} is not open; write `with CheckpointStore(...) as "
                "store:`, or call open() first"
            )

    def _commit(self, staged: StagedCheckpoint) -> CheckpointInfo:
        path = self.root / step_dir_name(staged.manifest.step)
        with self._writing:
            self._check_open()
            info = staged.commit(
                path,
                self._next_serial,
                lambda temporary: put_replacing(temporary, path, self.limits),
                self.ranks.background,
            )
            if not info.poison:
                self._healthy = info
            if self.ranks.index == 0:
                self._tidy(info.path)
            return info

    def _next_serial(self) -> int:
        is_unlocked = self._lock is not None and not (self.root / LOCK).exists()
        if is_unlocked or not self.root.is_dir():  # the folder was removed during the run
            make_folder(self.root)
            self._unlock()
            self._lock = _lock_root(self.root)
        self._serial += 1
        return self._serial

    def _tidy(self, new: Path) -> None:
        """Set links, prune and clean up after a save; a failure does not fail the save."""
        try:
            self._set_links()
            self._prune(dry_run=False)
            self._clean()
        except (OSError, CheckpointError) as error:
            logger.warning("%s is saved, but tidying up failed: %s", new, error)

    def _prune(self, *, dry_run: bool) -> Sequence[PruneDecision]:
        listing = self._listing.read()
        saved = self._healthy
        good = next((i for i in listing.infos if saved and i.serial == saved.serial), None)
        decisions = prune(listing, self.retention, self.limits, good=good, dry_run=dry_run)
        if not dry_run and any(decision.removed for decision in decisions):
            self._set_links()  # the best may be gone
        return decisions

    def _set_links(self) -> None:
        """Point ``last`` and ``best`` to their checkpoints, if the file system has links."""
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

    def _find(self, which: int | str | os.PathLike[str]) -> Path:
        """Return the path of a checkpoint, damaged or not, without fallback.

        Raises:
            CheckpointError: the root has no such checkpoint.
        """
        if isinstance(which, int):
            path = self.root / step_dir_name(which)
            if not os.path.lexists(path):
                steps = ", ".join(str(info.step) for info in self.list()) or "none"
                raise CheckpointError(f"{self.root} has no step {which}; it has: {steps}")
            return path
        if which == LAST:
            return self._find_last(self._listing.read())
        if which == BEST:
            return self._find_best(self.list())
        return Path(which)

    def _find_last(self, listing: Listing) -> Path:
        """Return the newest checkpoint, damaged or not, by the link, the serial or the step.

        A damaged checkpoint has no serial: it is the newest if the link points to it or, without a
        link, if its step is the highest.
        """
        linked = _linked(self.root / LAST)
        broken = [path for path, _ in listing.broken]
        if linked in broken:
            return linked
        if not listing.infos:
            if broken:
                return broken[-1]
            raise CheckpointError(f"there is no checkpoint in {self.root}")
        newest = listing.infos[-1].path
        if linked is None:
            return max([newest, *broken], key=lambda path: path.name.zfill(32))
        return newest

    def _find_best(self, infos: Sequence[CheckpointInfo]) -> Path:
        monitor = self.retention.monitor
        if monitor is not None:
            best = self.retention.best(infos)
            if not best:
                raise CheckpointError(f"no checkpoint in {self.root} has the metric {monitor!r}")
            return best[0].path
        linked = _linked(self.root / BEST)
        if linked is None:
            raise CheckpointError(
                f"{self.root} has no link to the best checkpoint; pass Retention(monitor=...) to "
                "the store"
            )
        return linked


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


def _linked(link: Path) -> Path | None:
    """Return a link's target if the target is a checkpoint in the same directory, or None."""
    with suppress(OSError):
        target = os.readlink(link)
        if step_from_name(target) is not None:
            return link.with_name(target)
    return None
