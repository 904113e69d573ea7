"""A trusted package whose parts hostile files misuse."""

import os
from os import system as system
from pathlib import Path
from typing import Any

import torch

from robo_orchard_core.utils.config import ClassConfig, Config


def called(*args: object, **kwargs: object) -> None:
    """Record a call in the trace file."""
    Path(os.environ["TRACE"]).write_text(f"{args} {kwargs}")


def make_nothing(x: int = 1) -> None:
    called(x)


def make_untold(x: int = 1):  # type: ignore[no-untyped-def]
    called(x)


def make_text(x: int = 1) -> str:
    called(x)
    return "text"


def make_anything(x: int = 1) -> Any:
    called(x)
    return torch.nn.Linear(1, 1)


def make_optimizer(x: int = 1) -> torch.optim.Optimizer:
    called(x)
    return torch.optim.SGD([torch.zeros(1)], lr=0.1)


class Net(torch.nn.Module):
    def __init__(self, width: int, depth: int = 1) -> None:
        called(width, depth)
        super().__init__()


class Plain:
    def __init__(self) -> None:
        called()


class PlainConfig(Config):
    x: int = 1

    def __post_init__(self) -> None:
        called()


class PlainBuilder(ClassConfig[Plain]):
    class_type: type[Plain] = Plain

    def __post_init__(self) -> None:
        called()


class Answers(type):
    def __getattr__(cls, name: str) -> Any:
        called(name)
        return Net


class Trap(metaclass=Answers):
    @property
    def inner(self) -> type:
        called()
        return Net


instance = Net
lazy = torch.nn.Identity()
