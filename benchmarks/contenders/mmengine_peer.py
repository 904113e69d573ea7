"""MMEngine's Runner, with its hooks."""

# mypy: disallow-subclassing-any=False
# (MMEngine is not in the dev extra, so its base classes have no type there.)

import tempfile
from typing import Any
from uuid import uuid4

import torch
from mmengine.hooks import Hook  # type: ignore[import-not-found]  # see above
from mmengine.model import BaseModel  # type: ignore[import-not-found]  # see above
from mmengine.optim import OptimWrapper, StepLR  # type: ignore[import-not-found]  # see above
from mmengine.runner import Runner  # type: ignore[import-not-found]  # see above

from benchmarks.workload import SCHEDULE_GAMMA, SCHEDULE_STEP_SIZE, Job


class Model(BaseModel):
    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model = job.model
        self.job = job

    def forward(
        self, inputs: torch.Tensor, labels: torch.Tensor, mode: str
    ) -> dict[str, torch.Tensor]:
        return {"loss": self.job.loss(self.model(inputs), labels)}


class NoopHook(Hook):
    def before_train_iter(self, *args: Any, **kwargs: Any) -> None:
        pass

    def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
        pass


def train(job: Job, hook_count: int) -> None:
    # MMEngine has its own StepLR, which can't wrap an optimizer with another LR scheduler.
    optimizer = job.make_optimizer()
    schedule = StepLR(optimizer, step_size=SCHEDULE_STEP_SIZE, gamma=SCHEDULE_GAMMA, by_epoch=False)
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            model=Model(job),
            work_dir=folder,
            experiment_name=uuid4().hex,  # a process must not reuse a name
            train_dataloader=job.loader,
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper=OptimWrapper(optimizer),
            param_scheduler=schedule,
            default_hooks={
                "runtime_info": None,
                "timer": None,
                "sampler_seed": None,
                "logger": None,
                "checkpoint": None,
                "param_scheduler": {"type": "ParamSchedulerHook"},
            },
            custom_hooks=[NoopHook() for _ in range(hook_count)],
            log_level="ERROR",
        )
        runner.train()
