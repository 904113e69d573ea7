"""Checkpoints in a folder: saved durably, verified when loaded, and removed by rules."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import RLock
from typing import Any

from robo_orchard_lab.pipeline.checkpoint.checkpoint_info import (
    CheckpointInfo,
    EachRank,
    PruneDecision,
    SavedState,
    Verification,
)
from robo_orchard_lab.pipeline.checkpoint.digests import DigestName, check_digest_name
from robo_orchard_lab.pipeline.checkpoint.finding import find_checkpoint
from robo_orchard_lab.pipeline.checkpoint.folder_names import BEST, LAST, step_folder
from robo_orchard_lab.pipeline.checkpoint.limits import ReadLimits
from robo_orchard_lab.pipeline.checkpoint.listing import RootListing
from robo_orchard_lab.pipeline.checkpoint.lock import RootLock
from robo_orchard_lab.pipeline.checkpoint.pending_save import PendingSave
from robo_orchard_lab.pipeline.checkpoint.pruning import prune
from robo_orchard_lab.pipeline.checkpoint.ranks import Ranks
from robo_orchard_lab.pipeline.checkpoint.removal import clean_leftovers, put_replacing
from robo_orchard_lab.pipeline.checkpoint.retention import Retention
from robo_orchard_lab.pipeline.checkpoint.shards import ShareOf
from robo_orchard_lab.pipeline.checkpoint.single_checkpoint import (
    load_on_ranks,
    verify_checkpoint,
)
from robo_orchard_lab.pipeline.checkpoint.tensor_image import ImagePool
from robo_orchard_lab.pipeline.checkpoint.writer import CheckpointImage
from robo_orchard_lab.pipeline.errors import CheckpointError
from robo_orchard_lab.pipeline.run.durable import make_folder, replace_link

logger = logging.getLogger(__name__)


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
        self._pool = ImagePool(pinned=True)
        self._writing = RLock()
        self._is_open = False
        self._lock: RootLock | None = None
        self._serial = 0

    def open(self) -> CheckpointStore:
        """Make the root, lock it, and clean up after a crash: a collective.

        Raises:
            StoreLockedError: another process writes there, or another store of this one.
            CheckpointError: the root can't be made or written to.
        """
        if self._is_open:
            raise CheckpointError(f"the store of {self.root} is open already")
        self.ranks.first(f"opening {self.root}", self._open)
        self._is_open = True
        return self

    def close(self) -> None:
        """Wait for a save in another thread, let others write, and give up kept memory."""
        with self._writing:
            self._is_open = False
            if self._lock is not None:
                self._lock.release()
                self._lock = None
        self._pool.clear()

    def __enter__(self) -> CheckpointStore:
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        parts: Mapping[str, Any],
        of_rank: Mapping[str, Any] | None = None,
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
                is sharded (a ``DTensor``, also in ``of_rank``) every rank saves what it has, as
                ``<part>.shard<rank>.safetensors``.
            of_rank: of this rank.
            metrics: by name; the retention may know one as ``monitor``.
            metadata: plain values, kept in the manifest.

        Raises:
            StateError: something can't be saved; the message names it.
            CheckpointError: it can't be written, on whichever rank; what there was is still there.
        """
        with self.prepare(step, parts, of_rank, metrics=metrics, metadata=metadata) as pending:
            return pending.commit()

    def prepare(
        self,
        step: int,
        parts: Mapping[str, Any],
        of_rank: Mapping[str, Any] | None = None,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> PendingSave:
        """Copy everything into memory of the store's own, to be written later: a collective.

        The memory is kept from one save to the next. What is given can be changed as soon as this
        returns.

        Args:
            step, parts, of_rank, metrics, metadata: see :meth:`save`.

        Raises:
            StateError: something can't be saved; the message names it.
        """
        self._check_open()
        made: list[CheckpointImage] = []

        def copy() -> None:
            image = CheckpointImage(
                step,
                parts,
                of_rank,
                ranks=self.ranks,
                digest=self.digest,
                pool=self._pool,
                limits=self.limits,
                metrics=metrics,
                metadata=metadata,
            )
            made.append(image)

        try:
            self.ranks.each(f"saving step {step}", copy)
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
        path = self.ranks.first(f"looking for {which!r}", lambda: self._find(which))
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
        listing = self.ranks.first(f"reading {self.root}", self._listing.read)
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

        return self.ranks.first(f"verifying {self.root}", read)

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

        return self.ranks.first(f"pruning {self.root}", decide)

    def _open(self) -> None:
        try:
            make_folder(self.root)
        except FileExistsError as error:
            raise CheckpointError(f"opening {self.root} failed: it is no folder") from error
        lock = RootLock(self.root)
        try:
            self._lock = lock
            self._clean()
            infos = self.list()
            self._serial = max((info.serial for info in infos), default=0)
            self._set_links()
        except BaseException:
            self._lock = None
            lock.release()
            raise

    def _clean(self) -> None:
        """Unless another run might be writing what looks like leftovers."""
        if self._lock is not None and self._lock.is_real:
            clean_leftovers(self.root, self.limits)

    def _check_open(self) -> None:
        if not self._is_open:
            raise CheckpointError(
                f"the store of {self.root} is not open; use it as in `with CheckpointStore(...) as "
                "store:`, or call open() first"
            )

    def _commit(self, image: CheckpointImage) -> CheckpointInfo:
        with self._writing:
            self._check_open()
            info = image.commit(
                self.root / step_folder(image.manifest.step),
                self._next_serial,
                lambda temporary: put_replacing(
                    temporary, self.root / step_folder(image.manifest.step), self.limits
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
