"""Saving and loading ResNet-50 with AdamW: 307 MB, durable and verified, compared with peers.

Two training steps create the optimizer's state. Each save uses a new file or folder; removing the
file and waiting for an idle disk are not timed. Contenders that flush have all data on the disk
when they return. A background save is compared with the steps trained meanwhile.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from threading import Thread
from time import perf_counter, sleep
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.environment import describe
from benchmarks.report import Report, Row, Table
from benchmarks.timing import Samples, interleave
from robo_orchard_lab.pipeline.checkpoint import CheckpointStore, DigestName

SAVE_BAR, LOAD_BAR, HOLD_BAR, SPEED_BAR = 1.35, 0.6, 0.15, 0.94
_PLAIN_SAVE, _PLAIN_LOAD = "torch.save", "torch.load, weights_only"


def run(*, quick: bool) -> Report:
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # on a disk, where /tmp is not
        bench = _Bench(Path(folder), small=quick)
        rounds = 1 if quick else 15
        tables = [
            _saving(bench, rounds),
            # The first rounds use memory that is new to the process.
            _loading(bench, rounds if quick else max(rounds, 6)),
            _holding(bench, rounds),
            _training_meanwhile(bench, 1 if quick else 15),
        ]
        faults = bench.faults()
        bench.close()
    return Report("checkpoints", tables, faults, describe(["torch", "accelerate", "xxhash"]))


class _Bench:
    """A model and its optimizer after two steps, with each way to save and load them."""

    def __init__(self, folder: Path, *, small: bool) -> None:
        from torchvision.models import resnet18, resnet50

        torch.manual_seed(0)
        self.folder = folder
        self.accelerator = Accelerator(cpu=True)
        model = (resnet18 if small else resnet50)()
        optimizer = torch.optim.AdamW(model.parameters())
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        for _ in range(2):
            self.model(torch.randn(2, 3, 32, 32)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self._numbers = count()
        self.stores: dict[str, CheckpointStore] = {}
        for digest in ("xxh3_128", "sha256"):
            self.stores[digest] = _store(folder / digest, digest).open()
            self.stores[digest].save(0, self.parts())
        torch.save(self.parts(), folder / "plain.pt")

    def close(self) -> None:
        for store in self.stores.values():
            store.close()

    def parts(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    @property
    def megabytes(self) -> float:
        return self.stores["xxh3_128"].load(0).info.size_bytes / 1e6

    def plain_save(self, *, flush: bool) -> float:
        path = self.folder / f"{next(self._numbers)}.pt"
        return self._timed(lambda: torch.save(self.parts(), path), path, flush=flush)

    def accelerate_save(self, *, flush: bool) -> float:
        path = self.folder / f"{next(self._numbers)}"
        return self._timed(lambda: self.accelerator.save_state(str(path)), path, flush=flush)

    def store_save(self, digest: str) -> float:
        store, step = self.stores[digest], next(self._numbers) + 1
        return self._timed(lambda: store.save(step, self.parts()), store.root / f"step_{step:08d}")

    def prepare(self) -> float:
        began_at = perf_counter()
        pending = self.stores["xxh3_128"].prepare(0, self.parts())
        took = perf_counter() - began_at
        pending.discard()
        return took

    def plain_load(self) -> float:
        return _seconds(lambda: torch.load(self.folder / "plain.pt", weights_only=True))

    def store_load(self, digest: str) -> float:
        return _seconds(lambda: self.stores[digest].load(0))

    def seconds_during_saves(self, train_step: Callable[[], object], *, saves: int) -> float:
        """Return the seconds of a step while a thread saves, or alone if ``saves`` is 0."""
        steps, seconds = 0, 0.0
        store = self.stores["xxh3_128"]
        for _ in range(max(saves, 1)):
            os.sync()
            step = next(self._numbers) + 1
            pending = store.prepare(step, self.parts()) if saves else None
            thread = Thread(target=pending.commit if pending else partial(sleep, 0.2))
            began_at = perf_counter()
            thread.start()
            while thread.is_alive():
                train_step()
                steps += 1
            seconds += perf_counter() - began_at
            thread.join()
            if pending:
                shutil.rmtree(store.root / f"step_{step:08d}")
        return seconds / steps

    def faults(self) -> list[str]:
        """Return the contenders whose loaded state differs from the saved state."""
        found = []
        for name, store in self.stores.items():
            loaded = store.load(0).parts["model"]
            live = self.model.state_dict()
            if not all(torch.equal(loaded[key], value) for key, value in live.items()):
                found.append(f"the store ({name}) gave other weights back")
        return found

    def _timed(self, save: Callable[[], object], path: Path, *, flush: bool = False) -> float:
        os.sync()
        began_at = perf_counter()
        save()
        if flush:
            _flush(path)
        took = perf_counter() - began_at
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        os.sync()
        return took


def _store(root: Path, digest: str) -> CheckpointStore:
    name: DigestName = "sha256" if digest == "sha256" else "xxh3_128"
    return CheckpointStore(root, digest=name)


def _saving(bench: _Bench, rounds: int) -> Table:
    contenders: dict[str, Callable[[], float]] = {
        _PLAIN_SAVE: partial(bench.plain_save, flush=False),
        "torch.save, flushed": partial(bench.plain_save, flush=True),
        "accelerate.save_state": partial(bench.accelerate_save, flush=False),
        "accelerate.save_state, flushed": partial(bench.accelerate_save, flush=True),
        "CheckpointStore.save": partial(bench.store_save, "xxh3_128"),
        "CheckpointStore.save, SHA-256": partial(bench.store_save, "sha256"),
    }
    samples = interleave(contenders, reference=_PLAIN_SAVE, rounds=rounds)
    title = f"Saving {bench.megabytes:.0f} MB; the store flushes and takes digests"
    return _table(title, samples, {"CheckpointStore.save": SAVE_BAR})


def _loading(bench: _Bench, rounds: int) -> Table:
    contenders: dict[str, Callable[[], float]] = {
        _PLAIN_LOAD: bench.plain_load,
        "CheckpointStore.load": partial(bench.store_load, "xxh3_128"),
        "CheckpointStore.load, SHA-256": partial(bench.store_load, "sha256"),
    }
    samples = interleave(contenders, reference=_PLAIN_LOAD, rounds=rounds)
    title = "Loading the same, from the page cache; the store verifies"
    return _table(title, samples, {"CheckpointStore.load": LOAD_BAR})


def _holding(bench: _Bench, rounds: int) -> Table:
    save = "CheckpointStore.save"
    contenders: dict[str, Callable[[], float]] = {
        save: partial(bench.store_save, "xxh3_128"),
        "CheckpointStore.prepare": bench.prepare,
    }
    samples = interleave(contenders, reference=save, rounds=rounds)
    title = "How long a save in the background holds the step"
    return _table(title, samples, {"CheckpointStore.prepare": HOLD_BAR})


def _training_meanwhile(bench: _Bench, rounds: int) -> Table:
    saves = 3
    rows: list[Row] = []
    for name, width in (("small steps", 32), ("larger steps", 512)):
        train_step = _training(width)
        alone, beside = f"{name}, alone", f"{name}, beside a save"
        contenders: dict[str, Callable[[], float]] = {
            alone: partial(bench.seconds_during_saves, train_step, saves=0),
            beside: partial(bench.seconds_during_saves, train_step, saves=saves),
        }
        samples = interleave(contenders, reference=alone, rounds=rounds)
        rows += _table("", samples, {beside: round(1 / SPEED_BAR, 3)}, scale=1e6).rows
    return Table(
        "Training while a save runs in the background",
        "us per step",
        rows,
        [f"The bar is a speed of {SPEED_BAR}, which is a step's time of {1 / SPEED_BAR:.3f}."],
    )


def _training(width: int) -> Callable[[], object]:
    """Return a step of a small model, dominated by Python or by computation."""
    layers = (torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 10))
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs, labels = torch.randn(64, width), torch.randint(10, (64,))

    def train_step() -> None:
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return train_step


def _table(title: str, samples: Samples, bars: dict[str, float], *, scale: float = 1e3) -> Table:
    rows = [
        Row.of(
            name,
            values,
            reference=samples.references.get(name),
            bar=bars.get(name),
            scale=scale,
        )
        for name, values in samples.values.items()
    ]
    return Table(title, "ms", rows)


def _seconds(call: Callable[[], object]) -> float:
    began_at = perf_counter()
    result = call()
    took = perf_counter() - began_at
    del result
    return took


def _flush(path: Path) -> None:
    """Flush a file, or a folder and its files, as other ways to save require."""
    for part in [*path.rglob("*"), path, path.parent]:
        descriptor = os.open(part, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
