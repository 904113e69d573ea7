"""The manifest of a checkpoint: what there is, how large, and with which digests."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import xxhash

from robo_orchard_core.utils.strict_json import JsonError, parse_json
from robo_orchard_lab.pipeline.checkpoint.state import decode_state, encode_state
from robo_orchard_lab.pipeline.errors import CheckpointError, PipelineConfigError, StateError

# --- folder names ----------------------------------------------------------------------------
# The names in a store's root: of checkpoints, and of what a crash may leave.


LOCK = ".lock"
LAST = "last"
BEST = "best"

_STEP = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,18})")
# With what is named by durable.temporary_name.
_LEFTOVER = re.compile(r"\.(step_[0-9]{8,19}|last|best)\.[0-9a-f]{32}\.(tmp|old|trash)")


def step_dir_name(step: int) -> str:
    """The name of a checkpoint's folder.

    >>> step_dir_name(1234)
    'step_00001234'
    """
    return f"step_{step:08d}"


def step_from_name(name: str) -> int | None:
    """The step that a folder is named for; None for any other name.

    >>> step_from_name("step_00001234"), step_from_name("step_1234"), step_from_name("last")
    (1234, None, None)
    """
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def set_aside_name(name: str) -> str:
    """What ``name`` is called while another takes its place; without that other, it is put back."""
    return f".{name}.{uuid.uuid4().hex}.old"


def trash_name(name: str) -> str:
    """What ``name`` is called while its files are removed."""
    return f".{name}.{uuid.uuid4().hex}.trash"


def kept_name(name: str) -> str:
    """What ``name`` is called, from when another takes its place, where it is never removed."""
    return f"{name}.kept-{uuid.uuid4().hex[:8]}"


def leftover_of(name: str) -> tuple[str, str] | None:
    """The name it was to have, and the kind, of what a crash has left; None for any other name.

    >>> leftover_of(".step_00000003.0123456789abcdef0123456789abcdef.tmp")
    ('step_00000003', 'tmp')
    """
    found = _LEFTOVER.fullmatch(name)
    return (found[1], found[2]) if found else None


# --- limits ----------------------------------------------------------------------------------
# How much of a stranger's checkpoint is looked at before it is refused.


MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """The most that a checkpoint may have of anything; what has more is refused, not read.

    They hold for writing, too, so that what was saved can be loaded with the same limits.

    Raises:
        PipelineConfigError: a limit is below 1.

    >>> ReadLimits(max_json_depth=10).max_json_depth
    10
    """

    max_files: int = 65_536
    """Of all ranks together, without the manifest."""
    max_manifest_bytes: int = 16 * MIB
    max_json_bytes: int = 64 * MIB
    """Of one part's JSON. Reading it takes up to some 25 times as much memory."""
    max_json_depth: int = 100
    """How deep lists and mappings may lie in one another."""
    max_header_bytes: int = 100_000_000
    """Of one file's list of tensors; the limit of safetensors itself."""
    max_tensors: int = 1_000_000
    """In one file."""
    max_total_bytes: int | None = None
    """Of all that one rank reads, the job's and ranks' together; None: as much as the machine has
    memory available."""
    any_owner: bool = False
    """Whether to read what belongs neither to the own user nor to root."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise PipelineConfigError(f"ReadLimits.{field.name} must be >= 1, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint's manifest says of it."""

    path: Path
    step: int
    serial: int
    """The how many-th save into its root it was, from 1; it orders them, also where a run has gone
    back to an earlier step. 0 for one that was not saved by a store."""
    saved_at: datetime
    """In UTC."""
    size_bytes: int
    """Of all its files, without the manifest."""
    ranks: int
    """How many processes saved it."""
    digest: str
    """The name of the digest that its files are verified by."""
    metrics: Mapping[str, float]
    metadata: Mapping[str, Any]


EachRank: TypeAlias = Callable[[int, int, Mapping[str, Any]], Any]
"""Called with the number of a rank, of how many that saved, and what it had for itself; gives what
is to be kept of that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """What was saved, verified and read to the CPU.

    The tensors of one part share one block of memory, which is there as long as one of them is.
    """

    parts: Mapping[str, Any]
    """Of the whole job, by name."""
    rank_parts: Mapping[str, Any]
    """Of the rank that has the number of this one; where fewer saved, of the last."""
    info: CheckpointInfo
    rank_results: tuple[Any, ...] = ()
    """Where as many ranks saved as load, or nobody asked: nothing. Else what ``each_rank`` gave."""
    skipped: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints that did not verify, and why."""


@dataclass(frozen=True, slots=True)
class Verification:
    """Whether everything in a checkpoint is as it was written."""

    path: Path
    problem: str | None
    """None where it is."""


@dataclass(frozen=True, slots=True)
class PruneDecision:
    """Whether a checkpoint is removed, and why."""

    path: Path
    removed: bool
    """With ``dry_run``: whether it would be."""
    why: str


_PART = r"[a-z][a-z0-9_]{0,63}"
PART_NAME = re.compile(_PART)
_FILE_NAME = re.compile(rf"({_PART})(?:\.(rank|shard)([0-9]{{5,9}}))?\.(json|safetensors)")
RESERVED_PART = "manifest"


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
        if not found or found[1] == RESERVED_PART:
            return None
        rank = None if found[3] is None else int(found[3])
        parsed = cls(found[1], rank, found[4] == "json", found[2] == "shard")
        return parsed if str(parsed) == name and not (parsed.is_json and parsed.is_shards) else None

    def __str__(self) -> str:
        kind = "shard" if self.is_shards else "rank"
        rank = "" if self.rank is None else f".{kind}{self.rank:05d}"
        return f"{self.part}{rank}.{'json' if self.is_json else 'safetensors'}"


# --- digests ---------------------------------------------------------------------------------
# Digests of a checkpoint's files, by name.


DigestName = Literal["xxh3_128", "sha256"]
"""``xxh3_128`` finds every accident, at the speed of memory; ``sha256`` also withstands someone
who means to make two files alike, and takes about as long as writing them."""

_MAKERS: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}

HEX_DIGITS = {"xxh3_128": 32, "sha256": 64}
"""How long a digest is, as text."""


def check_digest_name(name: str) -> None:
    """Refuse a name that is not a digest's.

    Raises:
        PipelineConfigError: the message has the names that there are.
    """
    if name not in _MAKERS:
        raise PipelineConfigError(f"digest must be one of {get_args(DigestName)}, got {name!r}")


def new_digest(name: str) -> Any:
    """A digest to ``update``; large updates run beside other threads."""
    return _MAKERS[name]()


def digest_of(name: str, data: bytes | bytearray | memoryview) -> str:
    """The digest of some bytes, in hexadecimal digits."""
    digest = new_digest(name)
    digest.update(data)
    return str(digest.hexdigest())


MANIFEST_FILE = "manifest.json"
FORMAT = "robo_orchard_lab.checkpoint"
VERSION = 1
_MAX_NUMBER = 2**63 - 1
_KEYS = {
    *("format", "version", "step", "serial", "saved_at", "ranks", "digest_name"),
    *("metrics", "metadata", "files"),
}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file's size in bytes and digest, as the manifest has them."""

    size: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that a checkpoint says of itself."""

    step: int
    serial: int
    saved_at: datetime
    ranks: int
    digest_name: str
    metrics: Mapping[str, float]
    metadata: Mapping[str, Any]
    files: Mapping[str, FileEntry]

    def info(self, path: Path) -> CheckpointInfo:
        """What it says of a checkpoint that lies there."""
        return CheckpointInfo(
            path=path,
            step=self.step,
            serial=self.serial,
            saved_at=self.saved_at,
            size_bytes=sum(entry.size for entry in self.files.values()),
            ranks=self.ranks,
            digest=self.digest_name,
            metrics=self.metrics,
            metadata=self.metadata,
        )

    def to_bytes(self) -> bytes:
        """The file's contents, which hold their own digest.

        Raises:
            StateError: the metrics or the metadata can't be written.
        """
        document = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "serial": self.serial,
            "saved_at": self.saved_at.isoformat(),
            "ranks": self.ranks,
            "digest_name": self.digest_name,
            "metrics": _tree("metrics", self.metrics),
            "metadata": _tree("metadata", self.metadata),
            "files": {
                name: {"size": entry.size, "digest": entry.digest}
                for name, entry in self.files.items()
            },
        }
        return _text({**document, "digest": digest_of(self.digest_name, _text(document))})

    def check_writable(self, limits: ReadLimits) -> None:
        """Refuse what could not be read again.

        Raises:
            StateError: the message says what is too much.
        """
        document = self.to_bytes()
        try:
            parse_json(document, max_depth=limits.max_json_depth)
        except JsonError as error:
            raise StateError(f"the metadata can't be saved: {error}") from None
        if len(document) > limits.max_manifest_bytes or len(self.files) > limits.max_files:
            raise StateError(
                f"the manifest would have {len(document)} bytes and {len(self.files)} files; at "
                f"most {limits.max_manifest_bytes} and {limits.max_files} would be read again"
            )

    def with_files(self, serial: int, files: Mapping[str, FileEntry]) -> Manifest:
        """The same of a checkpoint with these files, saved now."""
        now = datetime.now(UTC)
        return replace(self, serial=serial, saved_at=now, files=dict(sorted(files.items())))


def parse_manifest(text: bytes, limits: ReadLimits) -> Manifest:
    """The manifest that a file's contents are.

    Raises:
        CheckpointError: it is not as it was written, is of another version, or has more than
            ``limits`` allow.
    """
    try:
        document = parse_json(text, max_depth=limits.max_json_depth)
    except JsonError as error:
        raise CheckpointError(f"it can't be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError("it is not that of a checkpoint")
    if document.get("version") != VERSION:
        raise CheckpointError(f"expected version {VERSION}, found {document.get('version')!r:.40}")
    name = document.get("digest_name")
    if not isinstance(name, str) or name not in HEX_DIGITS:
        raise CheckpointError(f"it names the digest {name!r:.40}, which is not known")
    rest = {key: value for key, value in document.items() if key != "digest"}
    if document.get("digest") != digest_of(name, _text(rest)) or _text(document) != text:
        raise CheckpointError("it is not as it was written: its digest is another")
    try:
        return _manifest(name, rest, limits)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"it has a wrong entry: {error!r:.200}") from error


def _manifest(digest_name: str, document: dict[str, Any], limits: ReadLimits) -> Manifest:
    if set(document) != _KEYS:
        wrong = ", ".join(sorted(set(document) ^ _KEYS))
        raise CheckpointError(f"it lacks, or has besides: {wrong:.200}")
    files = document["files"]
    if not isinstance(files, dict):
        raise CheckpointError("files is not a mapping")
    if len(files) > limits.max_files:
        raise CheckpointError(f"it lists {len(files)} files; at most {limits.max_files} are read")
    ranks = _number("ranks", document["ranks"], least=1)
    metrics, metadata = (decode_state(document[key], {}) for key in ("metrics", "metadata"))
    if not isinstance(metrics, dict) or not isinstance(metadata, dict):
        raise CheckpointError("metrics or metadata is not a mapping")
    if not all(type(value) in (int, float) for value in metrics.values()):
        raise CheckpointError("a metric is not a number")
    return Manifest(
        step=_number("step", document["step"]),
        serial=_number("serial", document["serial"]),
        saved_at=_time(document["saved_at"]),
        ranks=ranks,
        digest_name=digest_name,
        metrics=metrics,
        metadata=metadata,
        files={name: _entry(name, entry, digest_name, ranks) for name, entry in files.items()},
    )


def _entry(name: str, entry: Any, digest_name: str, ranks: int) -> FileEntry:
    parsed = FileName.parse(name)
    if parsed is None or (parsed.rank is not None and parsed.rank >= ranks):
        raise CheckpointError(f"it lists a file {name!r:.80}, which none is named")
    if not isinstance(entry, dict) or set(entry) != {"size", "digest"}:
        raise CheckpointError(f"the entry of {name} is not its size and digest")
    digest = entry["digest"]
    if not isinstance(digest, str) or len(digest) != HEX_DIGITS[digest_name]:
        raise CheckpointError(f"the digest of {name} is not a {digest_name}")
    return FileEntry(_number(f"the size of {name}", entry["size"]), digest)


def _number(what: str, value: Any, *, least: int = 0) -> int:
    if type(value) is not int or not least <= value <= _MAX_NUMBER:
        raise CheckpointError(f"{what} is {value!r:.40}, expected a number from {least}")
    return value


def _time(value: Any) -> datetime:
    found = datetime.fromisoformat(value)
    if found.tzinfo != UTC:
        raise CheckpointError(f"saved_at is {value!r:.40}, expected a time in UTC")
    return found


def _tree(what: str, value: Mapping[str, Any]) -> Any:
    try:
        tree, tensors = encode_state(value)
    except (StateError, RecursionError) as error:
        raise StateError(f"the {what} can't be saved: {error}") from error
    if tensors:
        raise StateError(f"the {what} can't be saved: {', '.join(tensors)} is a tensor")
    return tree


def _text(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
