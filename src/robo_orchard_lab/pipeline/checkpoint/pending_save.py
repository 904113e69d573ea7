"""A checkpoint between its copy and its commit."""

from __future__ import annotations

from collections.abc import Callable

from robo_orchard_lab.pipeline.checkpoint.checkpoint_info import CheckpointInfo
from robo_orchard_lab.pipeline.checkpoint.writer import CheckpointImage
from robo_orchard_lab.pipeline.errors import CheckpointError


class PendingSave:
    """A checkpoint in memory, to be written or dropped. As a context manager, it drops itself."""

    def __init__(
        self, image: CheckpointImage, commit: Callable[[CheckpointImage], CheckpointInfo]
    ) -> None:
        """``commit`` writes the image; it is released afterwards."""
        self._commit = commit
        self._image: CheckpointImage | None = image
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
