"""Types of the config API: mypy checks this file, and nothing runs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, assert_type

from robo_orchard_core.utils.cli import SettingConfig, pydantic_from_argparse
from robo_orchard_core.utils.config import (
    CallableConfig,
    ClassConfig,
    ClassType,
    Config,
    ConfigInstanceOf,
    Trust,
    config_of,
)
from robo_orchard_lab.utils import log_basic_config


class Hook: ...


class MyHook(Hook):
    def __init__(self, cfg: MyHookConfig) -> None: ...


H = TypeVar("H", bound=Hook, covariant=True)


class HooksConfig(ClassConfig[H]): ...


class MyHookConfig(HooksConfig[MyHook]):
    class_type: type[MyHook] = MyHook
    log_step_freq: int = 5


class Experiment(Config):
    hook: ConfigInstanceOf[HooksConfig[Hook]]
    kind: ClassType[Hook] = MyHook


class Settings(SettingConfig):
    experiment: Experiment | None = None


class LossConfig(CallableConfig[float]):
    func: Callable[..., float] = max


config = MyHookConfig(log_step_freq=3)
assert_type(config(), MyHook)
assert_type(LossConfig()(1, 2), float)
experiment = Experiment(hook=config)
assert_type(experiment.hook, HooksConfig[Hook])
assert_type(experiment.hook(), Hook)
assert_type(experiment.kind, type[Hook])
assert_type(config.replace(log_step_freq=1), MyHookConfig)
assert_type(config_of(MyHook)(), MyHook)
assert_type(config_of(len)([]), int)
assert_type(config.to_str("toml"), str)
assert_type(MyHookConfig.from_str("{}", format="yaml", trust=("my_team",)), MyHookConfig)
assert_type(MyHookConfig.load(Path("x.json"), trust=Trust().widened(MyHook)), MyHookConfig)
assert_type(pydantic_from_argparse(Settings, argparse.ArgumentParser()), Settings)
log_basic_config(level="INFO", format="%(message)s", force=True)

MyHookConfig(log_step_freq="x")  # type: ignore[arg-type]  # a wrong type
MyHookConfig(log_step_frq=1)  # type: ignore[call-arg]  # a wrong name
config.to_str("xml")  # type: ignore[arg-type]  # a wrong format
