"""Hook that exports the model: weights and config without the run."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import Field

from robo_orchard_core.utils.hook import RemovableHandle
from robo_orchard_lab.pipeline.context import PipelineHookArgs
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, PipelineHooksConfig
from robo_orchard_lab.pipeline.job_log import ROUTINE, job_logger
from robo_orchard_lab.pipeline.model import plain_model
from robo_orchard_lab.pipeline.model_card import ModelCardConfig
from robo_orchard_lab.pipeline.pretrained_folder import (
    MODEL_FOLDER,
    config_json,
    facts_of_run,
    folder_writer,
    has_own_writer,
)
from robo_orchard_lab.pipeline.requests import Request, StopRequest
from robo_orchard_lab.pipeline.run.durable import remove_leftovers
from robo_orchard_lab.pipeline.run.run_path import RunPath
from robo_orchard_lab.pipeline.sharding import gather_weights, non_finite_weights
from robo_orchard_lab.pipeline.trigger import Last, TriggerField

logger = job_logger(__name__)


class SaveModel(PipelineHooks):
    """Exported model in ``pretrained_model/``, in the layout of the Hugging Face Hub.

    A model with ``save_pretrained``, such as those of Transformers, Diffusers and LeRobot, writes
    config and weights itself; ``from_pretrained`` of its class reads the folder. Of any other
    model, ``model.safetensors`` holds the weights by the names of the plain model, and
    ``config.json`` its ``config`` if that has ``to_dict`` or is a dataclass, pydantic model or
    mapping. ``README.md`` is the model card: results, use, data, command, versions and
    configuration, without secrets.

    The model is written on the trigger ``every``, and at the end: at a limit or a hook's stop, but
    not at an interruption. The folder is replaced atomically; other files in it stay, and so does
    an edited card. Non-finite weights are not written: an error is logged, and the folder stays. A
    model that can't be written, as on a full disk, stays in host memory until there is room; the
    run ends with an error if there is no room at its end.

    - Ranks: all; the main process writes. Of a sharded model, it gathers the weights one by one.
    - Requests: writing the model.
    - State: none.
    - Cost: none for a step.

    Raises:
        PipelineConfigError: when the loop begins, no folder is set, the folder can't be replaced,
            or the config can't be written as JSON; when the first epoch begins, no hook keeps the
            weights to write; ``save_pretrained`` writes no safetensors.
    """

    keeps_trajectory = True
    reads = ("metrics", "model.weights", "model.buffers")
    changes = ("files",)
    requests = ("write",)

    def __init__(self, cfg: SaveModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self._folder = Path(MODEL_FOLDER)
        self._config: str | None = None
        self._requested_at: int | None = None  # completed steps at the last request
        self.register_for_loop(self._begin)
        if (weights := cfg.weights) is not None:  # refuses unknown weights before the first step
            self.on_epoch.before(lambda args: args.run.weight_set(weights))
        if cfg.every is not None:
            self.register_at_commit(partial(self._request, f"every {cfg.every}"), cfg.every)
        if cfg.at_end:
            self.register_at_commit(partial(self._request, "at the end"), Last())

    def _begin(self, args: PipelineHookArgs) -> RemovableHandle:
        self._requested_at = None
        if self.cfg.folder is not None:
            self._folder = self.cfg.folder
        elif args.run.folder is not None:
            self._folder = args.run.folder / MODEL_FOLDER
        else:
            raise PipelineConfigError(
                f"{self.name}.folder: no folder to write to; set folder here, or run_folder of the "
                "trainer"
            )
        model = plain_model(args.run)
        self._config = None if has_own_writer(model) else config_json(model, self.name)
        if args.accelerator.is_main_process:
            if os.path.ismount(self._folder):
                raise PipelineConfigError(
                    f"{args.run.locate(self.name, 'folder')}: {self._folder} is a mount point, "
                    "which can't be replaced; set a folder in it"
                )
            remove_leftovers(self._folder)

        def request_at_stop(request: Request) -> None:
            is_stop = isinstance(request, StopRequest) and request.exit_code is None
            if is_stop and self.cfg.at_end:
                self._request("at the end", args)

        return args.requests.listen(request_at_stop)

    def _request(self, reason: str, args: PipelineHookArgs) -> None:
        step = args.progress.steps_done
        if args.exception is None and step != self._requested_at:
            self._requested_at = step
            args.requests.write(lambda: self._write(args), reason, by=self.name)

    def _write(self, args: PipelineHookArgs) -> None:
        run, name = args.run, self.cfg.weights
        kept = None if name is None else run.weight_set(name)
        if names := non_finite_weights(run, kept):  # a collective
            logger.error(
                "%s: %s of the weights is not finite at %s; %s is not written",
                *(self.name, names[0], run.progress, self._folder),
            )
            return
        weights = gather_weights(run, kept)
        if weights is None:  # written by another rank
            return
        write = folder_writer(
            *(self._folder, plain_model(run), weights, facts_of_run(run), self.cfg.card),
            who=self.name,
            config=self._config,
            metadata={"global_step_id": str(run.progress.global_step_id)},
        )
        if run.write_folder(self._folder, write, self.name):
            found = self.name, self._folder, run.progress
            logger.info("%s: wrote %s at %s", *found, extra=ROUTINE)


class SaveModelConfig(PipelineHooksConfig[SaveModel]):
    """Trigger, folder and weights of the exported model.

    >>> SaveModelConfig(every="1 epoch", weights="EMA")().name
    'SaveModel'
    """

    class_type: type[SaveModel] = SaveModel
    every: TriggerField | None = Field(
        default=None, description="Trigger, such as '1 epoch'; None writes only at the end."
    )
    at_end: bool = Field(default=True, description="Write at the end of the run.")
    folder: Annotated[Path | None, RunPath()] = Field(
        default=None,
        description=f"Folder to write to; None for {MODEL_FOLDER}/ in the run's folder.",
    )
    weights: str | None = Field(
        default=None,
        description="Name of the hook whose weights to write, such as 'EMA'; None for the "
        "model's own.",
    )

    card: ModelCardConfig = Field(
        default_factory=ModelCardConfig,
        description="License, name, tags and language in the model card.",
    )

    def __post_init__(self) -> None:
        if self.every is None and not self.at_end:
            raise ValueError("the model would never be written; set every, or at_end=True")
