"""Manifest of a checkpoint directory, with the names, limits and digests of its files.

The manifest lists size and digest of every file, and holds a digest of itself.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import xxhash

from robo_orchard_core.utils.strict_json import JsonError, parse_json
from robo_orchard_lab.pipeline.checkpoint.state_tree import decode_state, encode_state
from robo_orchard_lab.pipeline.errors import CheckpointError, PipelineConfigError, StateError
from robo_orchard_lab.pipeline.progress import MAX_COUNT

# --- names in a store's root -----------------------------------------------------------------

CHECKPOINTS_FOLDER = "checkpoints"
"""Subfolder of a run's folder for checkpoints."""
LOCK = ".lock"
LAST = "last"
BEST = "best"

_STEP = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,15})")
# durable.temporary_name makes the names that end in .tmp.
_LEFTOVER = re.compile(r"\.(step_[0-9]{8,19}|last|best)\.[0-9a-f]{32}\.(tmp|old|trash)")


def step_dir_name(step: int) -> str:
    """Return the directory name of a step's checkpoint.

    >>> step_dir_name(1234)
    'step_00001234'
    """
    return f"step_{step:08d}"


def step_from_name(name: str) -> int | None:
    """Return the step of a checkpoint's directory name, or None for any other name.

    >>> step_from_name("step_00001234"), step_from_name("step_1234"), step_from_name("last")
    (1234, None, None)
    """
    found = _STEP.fullmatch(name)
    return int(found[1]) if found and int(found[1]) <= MAX_COUNT else None


def hidden_name(name: str, kind: Literal["old", "trash"]) -> str:
    """Return a name for ``name`` during its replacement ("old") or removal ("trash")."""
    return f".{name}.{uuid.uuid4().hex}.{kind}"


def kept_name(name: str) -> str:
    """Return a new name for ``name``, safe from cleanup."""
    return f"{name}.kept-{uuid.uuid4().hex[:8]}"


def leftover_of(name: str) -> tuple[str, str] | None:
    """Return the final name and the kind of a crash's leftover, or None for any other name.

    >>> leftover_of(".step_00000003.0123456789abcdef0123456789abcdef.tmp")
    ('step_00000003', 'tmp')
    """
    found = _LEFTOVER.fullmatch(name)
    return (found[1], found[2]) if found else None


# --- names in a checkpoint directory ---------------------------------------------------------

MANIFEST_FILE = "manifest.json"
_PART = r"[a-z][a-z0-9_]{0,63}"
_PART_NAME = re.compile(_PART)
_RESERVED_PART = "manifest"
_FILE_NAME = re.compile(rf"({_PART})(?:\.(rank|shard)([0-9]{{5,9}}))?\.(json|safetensors)")


def check_part_name(part: str) -> None:
    """Refuse an invalid part name with a StateError."""
    if not _PART_NAME.fullmatch(part) or part == _RESERVED_PART:
        raise StateError(
            f"a part can't be named {part!r}: expected up to 64 small letters, digits and "
            f"underscores, other than {_RESERVED_PART!r}"
        )


@dataclass(frozen=True, slots=True)
class FileName:
    """Parsed name of a file in a checkpoint."""

    part: str
    rank: int | None
    """Rank that wrote the file; None for a file of the job."""
    is_json: bool
    is_shards: bool = False
    """True for shards of a part's tensors, of the job or of all ranks' parts of that name."""

    @classmethod
    def parse(cls, name: str) -> FileName | None:
        """Parse a file name; return None for an invalid name.

        >>> FileName.parse("random.rank00001.json")
        FileName(part='random', rank=1, is_json=True, is_shards=False)
        >>> FileName.parse("../model.json"), FileName.parse("manifest.json")
        (None, None)
        """
        found = _FILE_NAME.fullmatch(name)
        if not found or found[1] == _RESERVED_PART:
            return None
        rank = None if found[3] is None else int(found[3])
        parsed = cls(found[1], rank, found[4] == "json", found[2] == "shard")
        return parsed if str(parsed) == name and not (parsed.is_json and parsed.is_shards) else None

    def __str__(self) -> str:
        kind = "shard" if self.is_shards else "rank"
        rank = "" if self.rank is None else f".{kind}{self.rank:05d}"
        return f"{self.part}{rank}.{'json' if self.is_json else 'safetensors'}"


# --- limits and results ----------------------------------------------------------------------

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLimits:
    """Maximum sizes of an untrusted checkpoint, checked before reading and parsing.

    Saving applies the limits as well, so that a saved checkpoint can be loaded. The defaults leave
    room for a model of 65,536 parameter tensors with Adam's state. Refusing a checkpoint needs up
    to 300 MiB of memory in addition to its tensors.

    Raises:
        PipelineConfigError: a limit is below 1.

    >>> ReadLimits(max_json_depth=10).max_json_depth
    10
    """

    max_files: int = 65_536
    """Files of all ranks, without the manifest; also the number of ranks."""
    max_manifest_bytes: int = 16 * MIB
    max_json_bytes: int = 32 * MIB
    """JSON of the job, in sum, and of each rank, in sum. An optimizer needs about 500 bytes per
    parameter tensor."""
    max_json_values: int = 2_097_152
    """Values and keys in that JSON; about 20 per parameter tensor."""
    max_json_depth: int = 100
    """Nesting depth of lists and mappings."""
    max_header_bytes: int = 64 * MIB
    """Safetensors headers of the job, in sum, and of each rank, in sum, and of a file of shards."""
    max_tensors: int = 262_144
    """Tensors in these headers."""
    max_shards: int = 4_194_304
    """Shards of one part's tensors, in sum: 2,048 ranks with 2,048 tensors."""
    max_total_bytes: int | None = None
    """Bytes that one rank reads in total; None: the available memory."""
    any_owner: bool = False
    """Read files of other users than the current one and root."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int and value < 1:
                raise PipelineConfigError(f"ReadLimits.{field.name} must be >= 1, got {value}")


def check_sums(error: type[StateError], limits: ReadLimits, **found: int) -> None:
    """Raise ``error`` if a number exceeds the limit of its name, a field of :class:`ReadLimits`."""
    for name, count in found.items():
        if count > (most := getattr(limits, name)):
            what = name.removeprefix("max_").replace("_", " ")
            verb = "are read" if error is CheckpointError else "would be read again"
            raise error(f"it has {count} {what}; at most {most} {verb} (ReadLimits.{name})")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """Description of a checkpoint, from its manifest."""

    path: Path
    step: int
    serial: int
    """Number of the save into its root, from 1; orders checkpoints, also after a run returned to
    an earlier step. 0 for a checkpoint without a store."""
    saved_at: datetime
    """Time in UTC."""
    size_bytes: int
    """Size of all files, without the manifest."""
    ranks: int
    """World size of the save."""
    digest: str
    """Name of the digest."""
    metrics: Mapping[str, float]
    metadata: Mapping[str, Any]
    non_finite: tuple[str, ...] | None
    """First names of non-finite states of any rank, such as ``model/fc.weight``, and ``losses`` for
    a loss since the checkpoint before; empty if all are finite; None if not checked."""

    @property
    def poison(self) -> str:
        """Reason not to resume, such as "has non-finite values in model/fc.weight", or "".

        A checkpoint that was not checked, and non-finite losses alone, count as healthy.
        """
        names = ", ".join(name for name in self.non_finite or () if name != LOSSES)
        return f"has non-finite values in {names}" if names else ""


EachRank: TypeAlias = Callable[[int, int, Mapping[str, Any]], Any]
"""Function of a saved rank, the saved world size, and the rank's parts; returns a value to keep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """Verified state of a checkpoint, on the CPU.

    Tensors of one part may share a block of memory, which lives as long as any of them.
    """

    parts: Mapping[str, Any]
    """State of the job, by part."""
    rank_parts: Mapping[str, Any]
    """State of this rank, by part; the last saved rank's if fewer ranks saved."""
    info: CheckpointInfo
    rank_results: tuple[Any, ...] = ()
    """Results of ``each_rank`` by saved rank; empty if the world size is unchanged."""
    skipped: tuple[tuple[Path, str], ...] = ()
    """Newer checkpoints that did not verify, and the reasons."""


@dataclass(frozen=True, slots=True)
class Verification:
    """Result of comparing a checkpoint's files with their digests."""

    path: Path
    problem: str | None
    """None for an intact checkpoint."""


@dataclass(frozen=True, slots=True)
class PruneDecision:
    """Decision to remove or keep a checkpoint, and the reason."""

    path: Path
    removed: bool
    """True if removed, or to be removed in a dry run."""
    why: str


# --- digests ---------------------------------------------------------------------------------

DigestName = Literal["xxh3_128", "sha256"]
"""``xxh3_128`` detects accidental changes, at the speed of memory. ``sha256`` also resists
deliberate collisions, and costs about as much time as writing."""

_MAKERS: dict[str, Callable[[], Any]] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
_HEX_DIGITS = {"xxh3_128": 32, "sha256": 64}


def check_digest_name(name: str) -> None:
    """Refuse an unknown digest with a PipelineConfigError."""
    if name not in _MAKERS:
        raise PipelineConfigError(f"digest must be one of {get_args(DigestName)}, got {name!r}")


def new_digest(name: str) -> Any:
    """Return an empty digest; large updates release the interpreter lock."""
    return _MAKERS[name]()


def digest_of(name: str, data: bytes | bytearray | memoryview) -> str:
    """Return the hexadecimal digest of ``data``."""
    digest = new_digest(name)
    digest.update(data)
    return str(digest.hexdigest())


# --- manifest --------------------------------------------------------------------------------

FORMAT = "robo_orchard_lab.checkpoint"
VERSION = 1
LOSSES = "losses"
_MAX_NON_FINITE = 5  # names in a manifest
_MAX_BYTES = 2**63 - 1


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size in bytes and digest of a file."""

    size: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Contents of a checkpoint's manifest."""

    step: int
    serial: int
    saved_at: datetime
    ranks: int
    digest_name: str
    metrics: Mapping[str, float]
    metadata: Mapping[str, Any]
    files: Mapping[str, FileEntry]
    non_finite: tuple[str, ...] | None = None

    def info(self, path: Path) -> CheckpointInfo:
        """Describe the checkpoint at ``path``."""
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
            non_finite=self.non_finite,
        )

    def to_bytes(self) -> bytes:
        """Serialize the manifest, with a digest of itself.

        Raises:
            StateError: the metrics or the metadata can't be written.
        """
        document = {
            "format": FORMAT,
            "version": VERSION,
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "saved_at": self.saved_at.isoformat(),
            "metrics": _tree("metrics", self.metrics),
            "metadata": _tree("metadata", self.metadata),
            "files": {name: asdict(entry) for name, entry in self.files.items()},
        }
        text = _text(document)
        return _with_digest(text, digest_of(self.digest_name, text))

    def check_writable(self, limits: ReadLimits) -> bytes:
        """Return the serialized manifest; raise StateError if it exceeds the limits."""
        document = self.to_bytes()
        if len(document) > limits.max_manifest_bytes:
            raise StateError(
                f"the manifest would have {len(document)} bytes; at most "
                f"{limits.max_manifest_bytes} would be read again"
            )
        try:
            parse_manifest(document, limits)
        except CheckpointError as error:
            if isinstance(error.__cause__, JsonError):
                raise StateError(f"the metadata can't be saved: {error.__cause__}") from None
            raise StateError(f"the manifest would not be read again: {error}") from None
        return document

    def with_files(
        self, serial: int, files: Mapping[str, FileEntry], non_finite: Sequence[str]
    ) -> Manifest:
        """Return a copy with these files, non-finite names and this serial, saved now."""
        return replace(
            self,
            serial=serial,
            saved_at=datetime.now(UTC),
            files=dict(sorted(files.items())),
            non_finite=None
            if self.non_finite is None
            else tuple(map(_shown, non_finite[:_MAX_NON_FINITE])),
        )


def parse_manifest(text: bytes, limits: ReadLimits) -> Manifest:
    """Parse and verify the contents of a manifest file.

    Raises:
        CheckpointError: the manifest was changed, has another version, or exceeds the limits.
    """
    try:
        document = parse_json(
            text, max_depth=limits.max_json_depth, max_values=limits.max_json_values
        )
    except JsonError as error:
        raise CheckpointError(f"not a manifest: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"not a manifest: expected the format {FORMAT!r}")
    if document.get("version") != VERSION:
        raise CheckpointError(f"expected version {VERSION}, found {document.get('version')!r:.40}")
    name = document.get("digest_name")
    if not isinstance(name, str) or name not in _MAKERS:
        raise CheckpointError(f"unknown digest_name {name!r:.40}")
    rest = {key: value for key, value in document.items() if key != "digest"}
    content = _text(rest)
    digest = document.get("digest")
    if digest != digest_of(name, content) or _with_digest(content, digest) != text:
        raise CheckpointError("the manifest was changed: its own digest does not match")
    try:
        return _manifest(name, rest, limits)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"invalid entry in the manifest: {error!r:.200}") from error


def _manifest(digest_name: str, document: dict[str, Any], limits: ReadLimits) -> Manifest:
    expected = {"format", "version", *(field.name for field in fields(Manifest))}
    if set(document) != expected:
        wrong = ", ".join(sorted(set(document) ^ expected))
        raise CheckpointError(f"missing or unknown entries in the manifest: {wrong:.200}")
    files = document["files"]
    if not isinstance(files, dict):
        raise CheckpointError("files is not a mapping")
    if len(files) > limits.max_files:
        raise CheckpointError(f"it lists {len(files)} files; at most {limits.max_files} are read")
    ranks = _number("ranks", document["ranks"], least=1, most=limits.max_files)
    metrics, metadata = (decode_state(document[key], {}) for key in ("metrics", "metadata"))
    if not isinstance(metrics, dict) or not isinstance(metadata, dict):
        raise CheckpointError("metrics or metadata is not a mapping")
    if not all(type(value) in (int, float) for value in metrics.values()):
        raise CheckpointError("a metric is not a number")
    non_finite = document["non_finite"]
    if non_finite is not None:
        is_list = isinstance(non_finite, list) and len(non_finite) <= _MAX_NON_FINITE
        if not is_list or any(type(n) is not str or n != _shown(n) for n in non_finite):
            raise CheckpointError(f"non_finite is {non_finite!r:.80}, expected a list of names")
        non_finite = tuple(non_finite)
    saved_at = datetime.fromisoformat(document["saved_at"])
    if saved_at.tzinfo != UTC:
        raise CheckpointError(f"saved_at is {document['saved_at']!r:.40}, expected a time in UTC")
    return Manifest(
        step=_number("step", document["step"]),
        serial=_number("serial", document["serial"]),
        saved_at=saved_at,
        ranks=ranks,
        digest_name=digest_name,
        metrics=metrics,
        metadata=metadata,
        files={name: _entry(name, entry, digest_name, ranks) for name, entry in files.items()},
        non_finite=non_finite,
    )


def _entry(name: str, entry: Any, digest_name: str, ranks: int) -> FileEntry:
    parsed = FileName.parse(name)
    if parsed is None or (parsed.rank is not None and parsed.rank >= ranks):
        raise CheckpointError(f"it lists a file {name!r:.80}, which is not a valid name")
    if not isinstance(entry, dict) or set(entry) != {"size", "digest"}:
        raise CheckpointError(f"the entry of {name} is not its size and digest")
    digest = entry["digest"]
    if not isinstance(digest, str) or len(digest) != _HEX_DIGITS[digest_name]:
        raise CheckpointError(f"the digest of {name} is not a {digest_name}")
    return FileEntry(_number(f"the size of {name}", entry["size"], most=_MAX_BYTES), digest)


def _number(what: str, value: Any, *, least: int = 0, most: int = MAX_COUNT) -> int:
    if type(value) is not int or not least <= value <= most:
        raise CheckpointError(
            f"{what} is {value!r:.40}, expected a whole number from {least} to {most}"
        )
    return value


def _shown(name: str) -> str:
    """Return a tensor's name as a short printable text."""
    return (name if name.isprintable() else ascii(name))[:200]


def _tree(what: str, value: Mapping[str, Any]) -> Any:
    try:
        tree, tensors = encode_state(value)
    except (StateError, RecursionError) as error:
        raise StateError(f"the {what} can't be saved: {error}") from error
    if tensors:
        raise StateError(f"the {what} can't be saved: {', '.join(tensors)} is a tensor")
    return tree


def _with_digest(text: bytes, digest: str) -> bytes:
    """Add the digest of a manifest's text: the first key in their order."""
    return b'{\n "digest": "' + digest.encode() + b'",' + text.removeprefix(b"{")


def _text(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
