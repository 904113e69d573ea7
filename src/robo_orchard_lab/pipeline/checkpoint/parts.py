"""Named parts of a state as files: tensors in safetensors, the rest in JSON."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from robo_orchard_lab.pipeline.checkpoint.info import ReadLimits
from robo_orchard_lab.pipeline.checkpoint.ranks import Ranks
from robo_orchard_lab.pipeline.checkpoint.safetensors_layout import RESERVED_NAME, TensorLayout
from robo_orchard_lab.pipeline.checkpoint.shards import shards_to_write
from robo_orchard_lab.pipeline.checkpoint.staging_buffer import ImagePool, TensorImage
from robo_orchard_lab.pipeline.checkpoint.strict_json import JsonError, check_depth, parse_json
from robo_orchard_lab.pipeline.errors import CheckpointError, StateError
from robo_orchard_lab.pipeline.sharded_tensors import has_sharded, is_sharded

# --- state tree ------------------------------------------------------------------------------
# Nested states as JSON and tensors, exactly and back.


# What JSON can't say is an object with one key that starts with this.
_MARK = "$"


def encode_state(state: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A state as a JSON document and the tensors that it refers to by their place in it.

    A state is made of None, bool, int, float, str, tensors, lists, tuples, and mappings with such
    keys; ``collections.Counter`` keeps its type. NumPy's numbers come back as Python's.

    Raises:
        StateError: anything else is in it; the message names its place.

    >>> encode_state({"best": float("inf"), "seen": (1, 2)})
    ({'best': {'$float': 'inf'}, 'seen': {'$tuple': [1, 2]}}, {})
    """
    tensors: dict[str, torch.Tensor] = {}
    return _encode(state, "", tensors), tensors


def _encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, torch.Tensor):
        name, count = place, 1
        # Keys with dots in them, or 1 beside "1", give one place twice.
        while name in tensors or name == RESERVED_NAME:
            count += 1
            name = f"{place}#{count}"
        tensors[name] = value.detach()
        return {"$tensor": name}
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return _encode(value.item(), place, tensors)

    def child(key: object, item: Any) -> Any:
        return _encode(item, f"{place}.{key}" if place else str(key), tensors)

    if type(value) in (list, tuple):
        items = [child(index, item) for index, item in enumerate(value)]
        return items if type(value) is list else {"$tuple": items}
    if isinstance(value, Mapping):
        plain = all(type(key) is str and not key.startswith(_MARK) for key in value)
        if plain and type(value) is not Counter:
            return {key: child(key, item) for key, item in value.items()}
        pairs = [
            [_encode(key, f"{place}.{key}", tensors), child(key, item)]
            for key, item in value.items()
        ]
        return {"$counter" if type(value) is Counter else "$dict": pairs}
    raise StateError(
        f"{place or 'the state'} can't be saved: expected None, bool, int, float, str, a tensor, "
        f"list, tuple or mapping, found {type(value).__name__}"
    )


def decode_state(document: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The state that :func:`encode_state` made the document and the tensors of.

    Raises:
        StateError: the document has a mark that is not known, or names a tensor that is not there.
    """
    if isinstance(document, list):
        return [decode_state(item, tensors) for item in document]
    if not isinstance(document, dict):
        return document
    marks = [key for key in document if key.startswith(_MARK)]
    if not marks:
        return {key: decode_state(item, tensors) for key, item in document.items()}
    try:
        ((mark, content),) = document.items()
        if mark == "$float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content]
        if mark == "$tensor":
            return tensors[content]
        decoded = [decode_state(item, tensors) for item in content]
        if mark == "$tuple":
            return tuple(decoded)
        pairs = dict(decoded)
        if len(pairs) != len(decoded):
            raise ValueError("a key is there twice")
        return {"$dict": pairs, "$counter": Counter(pairs)}[mark]
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"a saved state has an unknown value {document!r:.80}") from error


_PART = r"[a-z][a-z0-9_]{0,63}"
_PART_NAME = re.compile(_PART)
_FILE_NAME = re.compile(rf"({_PART})(?:\.(rank|shard)([0-9]{{5,9}}))?\.(json|safetensors)")
_RESERVED = "manifest"


@dataclass(frozen=True, slots=True)
class FileName:
    """What a file of a checkpoint holds, by its name."""

    part: str
    rank: int | None
    """The process that wrote it; None for what belongs to the whole job."""
    is_json: bool
    is_shards: bool = False
    """Whether it holds shards of a part's tensors, which belong to the whole job or to all ranks'
    parts of that name."""

    @classmethod
    def parse(cls, name: str) -> FileName | None:
        """None for a name that no file of a checkpoint has.

        >>> FileName.parse("random.rank00001.json")
        FileName(part='random', rank=1, is_json=True, is_shards=False)
        >>> FileName.parse("../model.json"), FileName.parse("manifest.json")
        (None, None)
        """
        found = _FILE_NAME.fullmatch(name)
        if not found or found[1] == _RESERVED:
            return None
        rank = None if found[3] is None else int(found[3])
        parsed = cls(found[1], rank, found[4] == "json", found[2] == "shard")
        return parsed if str(parsed) == name and not (parsed.is_json and parsed.is_shards) else None

    def __str__(self) -> str:
        kind = "shard" if self.is_shards else "rank"
        rank = "" if self.rank is None else f".{kind}{self.rank:05d}"
        return f"{self.part}{rank}.{'json' if self.is_json else 'safetensors'}"


class PartImages:
    """The files of some parts, as bytes in memory; nothing in them is the caller's.

    Tensors lie in one image, which goes back to its pool with :meth:`release`. Of sharded tensors
    there is what this process has, in a file beside the part's others.
    """

    def __init__(
        self,
        parts: Mapping[str, Any],
        rank: int | None,
        pool: ImagePool,
        limits: ReadLimits,
        *,
        ranks: Ranks,
        shards_only: bool = False,
    ) -> None:
        """Encode and copy.

        Args:
            parts: by name.
            rank: whose they are; None for those of the whole job.
            pool: where the image comes from.
            limits: of what would be read again.
            ranks: who saves.
            shards_only: whether the rest is another process's to write.

        Raises:
            StateError: a part has a name or a value that can't be saved, or more than the limits
                would let be read; the message names it.
        """
        self.files: dict[str, bytes | memoryview] = {}
        self._pool = pool
        self._image: TensorImage | None = None
        found: dict[str, tuple[TensorLayout, dict[str, torch.Tensor]]] = {}

        def add(name: FileName, tensors: dict[str, torch.Tensor], about: Any = None) -> None:
            if tensors:
                layout = _layout(name, tensors, about, pool)
                _check_layout(name.part, layout, limits)
                found[str(name)] = (layout, tensors)

        for part, value in parts.items():
            if shards_only:
                document, tensors = None, encode_state(value)[1]
            else:
                document, tensors = _encode_part(part, value, limits, of_rank=rank is not None)
            sharded = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
            if sharded:
                tensors = {name: t for name, t in tensors.items() if name not in sharded}
                shards, about = _shards(part, sharded, ranks.count)
                add(FileName(part, ranks.index, is_json=False, is_shards=True), shards, about)
            if shards_only:
                continue
            if document is not None:
                self.files[str(FileName(part, rank, is_json=True))] = document
            add(FileName(part, rank, is_json=False), tensors)
        if found:
            self._copy(found)

    def _copy(self, found: dict[str, tuple[TensorLayout, dict[str, torch.Tensor]]]) -> None:
        files = list(found.values())
        self._image = self._pool.take([layout for layout, _ in files])
        try:
            self.files.update(zip(found, self._image.fill(files), strict=True))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the memory back; to be called once no file is read any more."""
        self.files = {}
        if self._image is not None:
            self._pool.give_back(self._image)
            self._image = None


def decode_part(
    document: bytes | None, tensors: dict[str, torch.Tensor] | None, limits: ReadLimits
) -> Any:
    """A part as it was saved, from the contents of its JSON file and its tensors.

    Raises:
        CheckpointError: they are not what was written, or more than ``limits`` allow.
    """
    if document is None:
        return tensors
    try:
        tree = parse_json(document, max_depth=limits.max_json_depth)
        return decode_state(tree, tensors or {})
    except RecursionError:  # the caller lies deep itself
        raise CheckpointError("it is nested too deep to be read here") from None
    except (JsonError, StateError) as error:
        raise CheckpointError(str(error)) from error


def _encode_part(
    part: str, value: Any, limits: ReadLimits, *, of_rank: bool
) -> tuple[bytes | None, dict[str, torch.Tensor]]:
    """A part's JSON and its tensors. A mapping of nothing but tensors has no JSON, unless it is a
    rank's and has sharded ones: it is by the JSON that their files are known for those of ranks."""
    if not _PART_NAME.fullmatch(part) or part == _RESERVED:
        raise StateError(
            f"a part can't be named {part!r}: expected up to 64 small letters, digits and "
            f"underscores, other than {_RESERVED!r}"
        )
    flat = isinstance(value, Mapping) and value and _is_flat(value)
    if flat and not (of_rank and has_sharded(value.values())):
        return None, {name: tensor.detach() for name, tensor in value.items()}
    try:
        tree, tensors = encode_state(value)
        check_depth(tree, limits.max_json_depth)
        document = json.dumps(tree, allow_nan=False).encode()
    except (JsonError, RecursionError):
        raise StateError(
            f"the part {part!r} is nested deeper than {limits.max_json_depth}"
        ) from None
    except ValueError as error:  # a StateError is one; so is a number with too many digits
        raise StateError(f"the part {part!r}: {error}") from error
    if len(document) > limits.max_json_bytes:
        raise StateError(
            f"the part {part!r} has {len(document)} bytes of JSON; at most {limits.max_json_bytes} "
            "would be read again. Save long lists of numbers as tensors, or raise "
            "ReadLimits.max_json_bytes"
        )
    return document, tensors


def _is_flat(value: Mapping[Any, Any]) -> bool:
    return all(
        type(name) is str and name != RESERVED_NAME and isinstance(tensor, torch.Tensor)
        for name, tensor in value.items()
    )


def _shards(
    part: str, sharded: Mapping[str, torch.Tensor], processes: int
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        return shards_to_write(sharded, processes)
    except StateError as error:
        raise StateError(f"the part {part!r}: {error}") from error


def _layout(
    name: FileName, tensors: dict[str, torch.Tensor], about: dict[str, str] | None, pool: ImagePool
) -> TensorLayout:
    try:
        return pool.layout(str(name), tensors, about)
    except StateError as error:
        raise StateError(f"the part {name.part!r}: {error}") from error


def _check_layout(part: str, layout: TensorLayout, limits: ReadLimits) -> None:
    if len(layout.beginning) > limits.max_header_bytes or len(layout.places) > limits.max_tensors:
        raise StateError(
            f"the part {part!r} has {len(layout.places)} tensors, whose names and shapes take "
            f"{len(layout.beginning)} bytes; at most {limits.max_tensors} and "
            f"{limits.max_header_bytes} would be read again"
        )
