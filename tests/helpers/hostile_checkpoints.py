"""Generator of hostile checkpoints.

Each checkpoint has a single defect and valid digests, since an attacker can compute digests. So the
defect itself must be detected.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from robo_orchard_lab.pipeline.checkpoint import ReadLimits

LIMITS = ReadLimits(
    max_files=50,
    max_manifest_bytes=1 << 20,
    max_json_bytes=1 << 20,
    max_header_bytes=1 << 20,
    max_tensors=100,
    max_total_bytes=1 << 24,
)
"""Small limits, so that files beyond them are cheap to create."""


@dataclass
class Made:
    """Contents of a checkpoint, to be spoilt."""

    manifest: dict[str, Any]
    files: dict[str, bytes]
    text: bytes | None = None
    """Replacement of the signed manifest."""
    spoil: list[Callable[[Path], None]] = field(default_factory=list)
    """Changes to the written directory."""

    @classmethod
    def read(cls, folder: Path) -> Made:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        return cls(json.loads(files.pop("manifest.json")), files)

    def sign(self, name: str) -> None:
        """Update a file's size and digest in the manifest."""
        entry = {"size": len(self.files[name]), "digest": digest(self.files[name])}
        self.manifest["files"][name] = entry

    def write(self, folder: Path) -> None:
        folder.mkdir()
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        (folder / "manifest.json").write_bytes(self.text or signed(self.manifest))
        for action in self.spoil:
            action(folder)


def digest(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()


def signed(manifest: dict[str, Any]) -> bytes:
    def text(document: dict[str, Any]) -> bytes:
        return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"

    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return text({**rest, "digest": digest(text(rest))})


def nested(depth: int, bottom: Any = 0) -> Any:
    for _ in range(depth):
        bottom = [bottom]
    return bottom


def wrong_number(r: random.Random) -> Any:
    return r.choice(
        [
            *(None, True, -1, -(2**63), 2**63, 10**40, 1.5, 1.0, "", "3", "x" * 1000, [], [1], {}),
            nested(r.randrange(1, 90)),
        ]
    )


def bad_json(r: random.Random) -> bytes:
    """Return text that is invalid as a part, a header and a manifest."""
    depth = r.choice([101, 150, 500, 1000, 5000, 100_000])
    return r.choice(
        [
            b"",
            b" ",
            b"\xff\xfe{}",
            b"\xef\xbb\xbf{}",
            b"{",
            b'{"a": 1,}',
            b"{'a': 1}",
            b'{"a": NaN}',
            b'{"a": -Infinity}',
            b'{"a": 1e999}',
            b'{"a": ' + b"9" * r.choice([5000, 100_000]) + b"}",
            b"[" * depth + b"]" * depth,
            b'{"a":' * depth + b"1" + b"}" * depth,
            b"[" * depth,
            b'{"a": 1, "a": 2}',
            b'{"a": {"b": 1, "c": 2, "b": 3}}',
            b'{"a": "\x00"}',
            b'"\\ud8"',
            bytes(r.randrange(256) for _ in range(r.randrange(1, 40))) + b"\xff",
            b"{}" * 2,
            b" " * (LIMITS.max_json_bytes + 1),
        ]
    )


def manifest_field(made: Made, r: random.Random) -> None:
    """Give a field of the manifest a wrong type or range."""
    wrong: dict[str, Callable[[], Any]] = {
        "format": lambda: r.choice([None, "", "other", 1, [], nested(50)]),
        "version": lambda: r.choice([None, 0, 2, 1.5, "1", [], {}, 10**30]),
        "step": lambda: wrong_number(r),
        "serial": lambda: wrong_number(r),
        "ranks": lambda: r.choice([0, wrong_number(r)]),
        "saved_at": lambda: r.choice([None, 1, "", "now", "2026-01-01", [], {}, "9" * 5000]),
        "digest_name": lambda: r.choice([None, "md5", "XXH3_128", 1, [], {}, "sha256"]),
        "files": lambda: r.choice([None, [], "x", 1, [1], nested(20)]),
        "metrics": lambda: r.choice([None, [], 1, {"a": "x"}, {"a": None}, {"a": {"$x": 1}}]),
        "metadata": lambda: r.choice([None, [], 1, "x", {"$x": 1}, {"$tensor": "w"}, nested(200)]),
    }
    name = r.choice(list(wrong))
    made.manifest[name] = wrong[name]()


def manifest_keys(made: Made, r: random.Random) -> None:
    """Remove or add a field of the manifest."""
    if r.random() < 0.5:
        del made.manifest[r.choice([key for key in made.manifest if key != "digest"])]
    else:
        made.manifest[r.choice(["", "pickle", "File", "files ", "\x00", "x" * 500])] = 1


def manifest_text(made: Made, r: random.Random) -> None:
    """Replace the manifest by other text, also with the same values."""
    text = signed(made.manifest)
    place = r.randrange(len(text))
    made.text = r.choice(
        [
            bad_json(r) or b"\0",
            text[:place] or b"\0",
            text + b" ",
            text.replace(b"{", b'{"step": 1,', 1),
            text.replace(b"\n", b"\r\n"),
            json.dumps(json.loads(text)).encode(),
            text[:place] + bytes([text[place] ^ 1 << r.randrange(8)]) + text[place + 1 :],
            text[:place] + text[place + 1 :],
            bytes(r.randrange(256) for _ in range(r.randrange(1, 300))),
            text + b" " * LIMITS.max_manifest_bytes,
        ]
    )


def file_name(made: Made, r: random.Random) -> None:
    """List a file with an invalid name."""
    made.manifest["files"][
        r.choice(
            [
                *("../secret", "../../secret.json", "/etc/passwd", "a/b.json", "./model.json", ""),
                *("manifest.json", "MODEL.json", "model.pt", "model.json\x00", "model.json\n", "."),
                *(
                    "model.rank1.json",
                    "model.rank00001.json",
                    "model.rank99999.json",
                    "модель.json",
                ),
                *("x" * 65 + ".json", "x" * 100_000 + ".json", "model.rank000000.json", "1.json"),
                *("model..json", ".model.json", "a-b.json", "model.json.json", "~.json"),
            ]
        )
    ] = {"size": 5, "digest": digest(b"12345")}


def file_entry(made: Made, r: random.Random) -> None:
    """Falsify the manifest's entry of a file."""
    name = r.choice(sorted(made.files))
    entry = made.manifest["files"][name]
    kind = r.randrange(5)
    if kind == 0:
        entry["size"] = r.choice(
            [wrong_number(r), 0, entry["size"] + 1, entry["size"] - 1, 2**62, 2**40]
        )
    elif kind == 1:
        found = entry["digest"]
        entry["digest"] = r.choice(
            [None, 1, [], "", found[:-1], found + "0", found.upper() + " ", "0" * 32, "я" * 32]
        )
    elif kind == 2:
        made.manifest["files"][name] = r.choice([None, 1, "x", [], {}, [5, "x"], nested(30)])
    elif kind == 3:
        entry["more"] = 1
    else:
        del entry[r.choice(["size", "digest"])]


def file_missing(made: Made, r: random.Random) -> None:
    """Remove a listed file, or replace it by a link, a directory or a pipe."""
    name = r.choice(sorted(made.files))

    def spoil(folder: Path) -> None:
        path = folder / name
        path.unlink()
        kind = r.randrange(5)
        if kind == 0:
            path.symlink_to(folder.parent / "secret")
        elif kind == 1:
            path.symlink_to(r.choice(["/dev/zero", "/etc/passwd", ".", path.name, "/dev/stdin"]))
        elif kind == 2:
            path.mkdir()
        elif kind == 3:
            os.mkfifo(path)

    made.spoil.append(spoil)


def file_huge(made: Made, r: random.Random) -> None:
    """Grow a sparse file, and its manifest entry, beyond memory."""
    name = r.choice(sorted(made.files))
    size = 1 << r.randrange(25, 43)
    made.manifest["files"][name]["size"] = size
    made.spoil.append(lambda folder: os.truncate(folder / name, size))


def many_files(made: Made, r: random.Random) -> None:
    """List more files than the limit."""
    entry = {"size": 1, "digest": digest(b"1")}
    made.manifest["files"].update({f"part{n}.json": entry for n in range(r.randrange(51, 300))})


def json_part(made: Made, r: random.Random) -> None:
    """Replace a part's JSON by invalid JSON or an invalid state tree."""
    name = r.choice([name for name in made.files if name.endswith(".json")])
    value: Any = r.choice(
        [
            {"$x": 1},
            {"$": 1},
            {"$float": r.choice(["1", "", None, 1, [], {}])},
            {"$tensor": r.choice(["nowhere", "", 1, None, [], {}, "__metadata__"])},
            {"$tuple": r.choice([None, 1])},
            {"$dict": r.choice([None, 1, [1], [[1]], [[1, 2, 3]], [[[], 1]], [[{}, 1]], "ab"])},
            {"$dict": [["a", 1], ["a", 2]]},
            {"$counter": r.choice([None, 1, [[1]], [[[], 1]]])},
            {"$float": "inf", "b": 1},
            {"$tuple": [], "$dict": []},
        ]
    )
    for _ in range(r.randrange(30)):
        value = r.choice([[value], {"a": value}, {"$tuple": [value]}, {"$dict": [[1, value]]}])
    made.files[name] = r.choice([bad_json(r), json.dumps(value).encode()])
    made.sign(name)


def tensors_missing(made: Made, r: random.Random) -> None:
    """Remove the tensors that a part's JSON names."""
    name = "optimizer.safetensors"
    del made.files[name], made.manifest["files"][name]


def header_text(made: Made, r: random.Random) -> None:
    """Replace a safetensors header by invalid JSON, or falsify its length."""
    name, header, data = _tensor_file(made, r)
    lengths = [0, 1, 2, len(header) - 1, len(header) + 1, 2**32, 2**62, 2**63, 2**64 - 1]
    if r.random() < 0.5:
        text = r.choice([bad_json(r), b"[]", b"1", b'"x"', b"null", b"{}", b'{"a": []}'])
        made.files[name] = struct.pack("<Q", len(text)) + text + data
    else:
        made.files[name] = struct.pack("<Q", r.choice(lengths)) + header + data
    made.sign(name)


def header_duplicate(made: Made, r: random.Random) -> None:
    """Duplicate a tensor, or a field of a tensor, in a header."""
    name, header, data = _tensor_file(made, r)
    entry = b'"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    text = r.choice(
        [
            header.replace(b"{", b"{" + entry * 2, 1),
            header.replace(b'"dtype":', b'"dtype":"U8","dtype":', 1),
            header.replace(b'"__metadata__":', b'"__metadata__":{},"__metadata__":', 1),
        ]
    )
    _set_header(made, name, text, data)


def header_entry(made: Made, r: random.Random) -> None:
    """Falsify a tensor's entry in a header."""
    name, text, data = _tensor_file(made, r)
    header = json.loads(text)
    tensor = r.choice([key for key in header if key != "__metadata__"])
    entry = header[tensor]
    begin, end = entry["data_offsets"]
    kind = r.randrange(8)
    if kind == 0:
        entry["dtype"] = r.choice([None, "", "F31", "f32", 1, [], {}, "OBJECT", "F4", "x" * 5000])
    elif kind == 1:
        shape = entry["shape"]
        entry["shape"] = r.choice(
            [
                *(None, 1, "x", {}, [-1], [1.5], ["1"], [None], [[1]], [True, *shape], [2**63]),
                *([*shape, 2], [2**62, 2**62], [2**32, 2**32], [1] * 65, [0, *shape, 2**63]),
                *([2**31] * 5, [1] * 10_000, [*shape, 0], [-1, -1]),
            ]
        )
    elif kind == 2:
        entry["data_offsets"] = r.choice(
            [
                *(None, 1, [], [begin], [begin, end, end], [end + 1, begin], [-1, end - begin - 1]),
                *(
                    [begin + 1, end + 1],
                    [begin, 2**63],
                    [float(begin), float(end)],
                    "ab",
                    [True, 1],
                ),
                *([begin + 2**40, end + 2**40], [begin, end - 1], [begin, end + 1], [0, 2**70]),
            ]
        )
    elif kind == 3:
        header[tensor] = r.choice([None, 1, "x", [], {}, [entry], nested(2)])
    elif kind == 4:
        entry["more"] = 1
    elif kind == 5:
        del entry[r.choice(["dtype", "shape", "data_offsets"])]
    elif kind == 6:
        header["__metadata__"] = r.choice([1, [], "x", {"a": 1}, {"a": None}, None])
    else:
        header["again"] = {"dtype": "U8", "shape": [end], "data_offsets": [0, end]}
    _set_header(made, name, json.dumps(header).encode(), data)


def header_many(made: Made, r: random.Random) -> None:
    """Exceed the limit of tensors or of the header's length."""
    name, text, data = _tensor_file(made, r)
    header = json.loads(text)
    nothing = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    if r.random() < 0.5:
        header.update({f"t{number}": nothing for number in range(r.randrange(101, 2000))})
    else:
        header["x" * (1 << 20)] = nothing
    _set_header(made, name, json.dumps(header).encode(), data)


def tensor_bytes(made: Made, r: random.Random) -> None:
    """Add or remove bytes after the tensors, or set a bool to a value above 1."""
    name, header, data = _tensor_file(made, r)
    kind = r.randrange(3)
    if kind == 0:
        data += bytes(r.randrange(1, 100))
    elif kind == 1:
        data = data[: r.randrange(len(data))]
    else:
        name, header, data = _tensor_file(made, r, "model.safetensors")
        begin, end = json.loads(header)["flags"]["data_offsets"]
        changed = bytearray(data)
        changed[r.randrange(begin, end)] = r.randrange(2, 256)
        data = bytes(changed)
    _set_header(made, name, header, data)


def hidden_bytes(made: Made, r: random.Random) -> None:
    """Insert bytes between two tensors."""
    name, text, data = _tensor_file(made, r, "model.safetensors")
    header = json.loads(text)
    places = [header[key]["data_offsets"] for key in header if key != "__metadata__"]
    at, more = r.choice(sorted(begin for begin, _ in places)), 8 * r.randrange(1, 20)
    for place in places:
        if place[0] >= at:
            place[:] = [place[0] + more, place[1] + more]
    data = data[:at] + bytes(more) + data[at:]
    _set_header(made, name, json.dumps(header).encode(), data)


def misaligned(made: Made, r: random.Random) -> None:
    """Shift tensors to unaligned offsets."""
    name, header, data = _tensor_file(made, r, "model.safetensors")
    _set_header(made, name, header + b" " * r.choice([1, 2, 3, 5, 7]), data, pad=False)


def _tensor_file(made: Made, r: random.Random, name: str | None = None) -> tuple[str, bytes, bytes]:
    name = name or r.choice([name for name in sorted(made.files) if name.endswith(".safetensors")])
    text = made.files[name]
    end = 8 + int.from_bytes(text[:8], "little")
    return name, text[8:end], text[end:]


def _set_header(made: Made, name: str, header: bytes, data: bytes, *, pad: bool = True) -> None:
    if pad:
        header = header.rstrip()
        header += b" " * (-(8 + len(header)) % 64)
    made.files[name] = struct.pack("<Q", len(header)) + header + data
    made.sign(name)


WAYS: list[Callable[[Made, random.Random], None]] = [
    manifest_field,
    manifest_keys,
    manifest_text,
    file_name,
    file_entry,
    file_missing,
    file_huge,
    many_files,
    json_part,
    tensors_missing,
    header_text,
    header_duplicate,
    header_entry,
    header_many,
    tensor_bytes,
    hidden_bytes,
    misaligned,
]


def make_hostile(good: Made, number: int) -> tuple[str, Made]:
    """Return the name of the defect, and the hostile checkpoint of a number."""
    r = random.Random(number)
    way = WAYS[number % len(WAYS)]
    made = copy.deepcopy(good)
    way(made, r)
    return way.__name__, made
