"""Write the model for others to use: weights and configuration, without the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from pydantic import Field

from robo_orchard_core.utils.hook import HookContext, RemovableHandle
from robo_orchard_lab.pipeline.checkpoint import write_weights
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.job_log import job_logger
from robo_orchard_lab.pipeline.model import plain_model
from robo_orchard_lab.pipeline.requests import Request, StopRequest
from robo_orchard_lab.pipeline.run.durable import remove_leftovers, replace_file
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.sharding import gather_weights
from robo_orchard_lab.pipeline.trigger import Last, TriggerField

logger = job_logger(__name__)

MODEL_FOLDER = "pretrained_model"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class SaveModel(PipelineHooks):
    """Keeps ``pretrained_model/`` in the run's folder, laid out as the Hugging Face Hub has it.

    ``model.safetensors`` has the weights by the names of the plain model; ``config.json`` what the
    model has as ``config``, where it has one: something with ``to_dict``, a dataclass, a pydantic
    model or a mapping. So ``from_pretrained`` of a class that is made for it reads the folder, and
    ``load_state_dict(load_file(...))`` works with every plain model.

    It is written on a schedule, and at the end: where a limit is reached, or a hook stops the run
    for good; not where the run is interrupted. Each file is replaced as a whole, the weights last;
    other files in the folder stay.

    It runs on every rank; the first one writes. It costs a step nothing. Of a sharded model the
    weights are gathered one by one, on the first rank.

    Raises:
        PipelineConfigError: when the loop begins, there is no folder, or the configuration can't
            be written as JSON; when the first epoch begins, no hook keeps the weights that are
            to be written.
    """

    keeps_trajectory = True

    def __init__(self, cfg: SaveModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._folder = Path(MODEL_FOLDER)
        self._config: str | None = None
        self._asked_at: int | None = None
        """How many steps were done when it was last asked for."""
        self._stops: RemovableHandle | None = None
        self.register_hook(
            "on_loop", HookContext.from_callable(before=self._begin, after=self._end)
        )
        if cfg.weights is not None:
            self.register_hook("on_epoch", HookContext.from_callable(before=self._check_weights))
        if cfg.every is not None:
            self.register_at_commit(lambda args: self._ask(args, f"every {cfg.every}"), cfg.every)
        if cfg.at_end:
            self.register_at_commit(lambda args: self._ask(args, "at the end"), Last())

    def _begin(self, args: PipelineHookArgs) -> None:
        self._asked_at = None
        if self.cfg.folder is not None:
            self._folder = self.cfg.folder
        elif args.run.folder is not None:
            self._folder = args.run.folder / MODEL_FOLDER
        else:
            raise PipelineConfigError(
                f"{self.name}: there is no folder to write to; give the trainer a run_folder, or "
                "the hook a folder"
            )
        self._config = config_text(plain_model(args.run), self.name)  # an error comes early
        if args.accelerator.is_main_process:
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                remove_leftovers(self._folder / name)
        if self.cfg.at_end:
            self._stops = args.requests.listen(lambda request: self._ask_if_over(args, request))

    def _end(self, args: PipelineHookArgs) -> None:
        if self._stops is not None:
            self._stops.remove()

    def _check_weights(self, args: PipelineHookArgs) -> None:
        if self.cfg.weights is not None:
            args.run.weight_set(self.cfg.weights)  # an error where there is none of that name

    def _ask_if_over(self, args: PipelineHookArgs, request: Request) -> None:
        if isinstance(request, StopRequest) and request.exit_code is None:
            self._ask(args, "at the end")

    def _ask(self, args: PipelineHookArgs, reason: str) -> None:
        step = args.progress.steps_done
        if args.exception is None and step != self._asked_at:
            self._asked_at = step
            args.requests.write(lambda: self._write(args), reason, by=self.name)

    def _write(self, args: PipelineHookArgs) -> None:
        run, name = args.run, self.cfg.weights
        kept = None if name is None else run.weight_set(name)
        weights = gather_weights(run, kept)
        if weights is None:  # another rank's to write
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._config is not None:
            replace_file(self._folder / CONFIG_FILE, self._config.encode())
        metadata = {
            "format": "pt",  # which transformers looks for
            "global_step_id": str(run.progress.global_step_id),
        }
        write_weights(self._folder / WEIGHTS_FILE, weights, metadata)
        logger.info("%s: wrote %s at %s", self.name, self._folder, run.progress)


class SaveModelConfig(PipelineHooksConfig[SaveModel]):
    """When to write the model, and where.

    >>> SaveModelConfig(every="1 epoch", weights="EMA")().name
    'SaveModel'
    """

    class_type: type[SaveModel] = SaveModel
    every: TriggerField | None = Field(
        default=None, description="The schedule by which it is written, such as '1 epoch'."
    )
    at_end: bool = Field(default=True, description="Whether it is written at the end of the run.")
    folder: Annotated[Path | None, RunPath()] = Field(
        default=None,
        description=f"The folder to write to; by default {MODEL_FOLDER}/ in the run's folder.",
    )
    weights: str | None = Field(
        default=None,
        description="The name of the hook whose weights to write, such as 'EMA'; None for the "
        "model's own.",
    )

    def __post_init__(self) -> None:
        if self.every is None and not self.at_end:
            raise ValueError("it would never write: give a schedule by every, or set at_end=True")


def config_text(model: torch.nn.Module, who: str) -> str | None:
    """What the model has as ``config``, as JSON; None where it has none that can be understood.

    Raises:
        PipelineConfigError: it holds something that JSON doesn't have.
    """
    # That of Hugging Face's ModelHubMixin, which keeps the arguments of the model's constructor.
    config = getattr(model, "config", None) or getattr(model, "_hub_mixin_config", None)
    if config is None:
        return None
    fields: Any
    if callable(getattr(config, "to_dict", None)):
        fields = config.to_dict()
    elif isinstance(config, pydantic.BaseModel):
        fields = config.model_dump(mode="json")
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = dataclasses.asdict(config)
    elif isinstance(config, Mapping):
        fields = dict(config)
    else:
        logger.warning(
            "%s: the model's config is a %s, which has no to_dict and is no dataclass, pydantic "
            "model or mapping; no %s is written",
            *(who, type(config).__qualname__, CONFIG_FILE),
        )
        return None
    try:
        return json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise PipelineConfigError(
            f"{who}: the model's config can't be written as JSON: {error}; give the config a "
            "to_dict that has numbers, texts, lists and mappings alone"
        ) from error
