"""Building experiments from configs, and passing objects from scripts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim import lr_scheduler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from torchmetrics.classification import MulticlassAccuracy

from robo_orchard_core.utils.config import ConfigBuildError, ConfigError, ConfigFieldError
from robo_orchard_lab.experiment import (
    AcceleratorConfig,
    DataConfig,
    DataOrderConfig,
    ExperimentConfig,
    LoaderConfig,
    ParameterGroup,
    TrainerConfig,
    config_of,
)
from robo_orchard_lab.experiment.optimizers import parameter_groups
from robo_orchard_lab.experiment.samples import MLP, Spirals
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    PipelineHooks,
    SimpleBatchProcessor,
    SupervisedProcessor,
)
from robo_orchard_lab.pipeline.data import DataOrder
from robo_orchard_lab.pipeline.errors import DataError, PipelineConfigError
from robo_orchard_lab.pipeline.hooks import (
    KeepBestConfig,
    LossTrackerConfig,
    MetricsLoggerConfig,
    MetricTrackerConfig,
    SaveCheckpointConfig,
    StatsMonitorConfig,
    ValidationHook,
    ValidationHookConfig,
)
from robo_orchard_lab.pipeline.hooks.mixin import HookContext
from robo_orchard_lab.pipeline.metrics import UnknownMetricError
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig, TrackerSinkConfig
from tiny import equal, weights


@pytest.fixture(autouse=True)
def below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Start each test in its own folder, which gets the runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Noisy(MLP):
    """Model with dropout, so training draws random numbers."""

    def __init__(self) -> None:
        super().__init__(2, [8], 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.dropout(inputs, 0.2, self.training))


def spirals(size: int = 30, batch_size: int = 4, seed: int = 0, **options: Any) -> LoaderConfig:
    dataset = config_of(Spirals, size=size, seed=seed)
    return LoaderConfig(dataset=dataset, batch_size=batch_size, **options)


def experiment(**changes: Any) -> ExperimentConfig:
    """Return an experiment of two epochs of eight steps, without checkpoints."""
    return ExperimentConfig(
        **{
            "seed": 3,
            "model": config_of(Noisy),
            "data": DataConfig(train=spirals(shuffle=True)),
            "batch_processor": config_of(
                SupervisedProcessor, loss=config_of(torch.nn.CrossEntropyLoss)
            ),
            "optimizer": config_of(torch.optim.SGD, lr=0.1),
            "trainer": TrainerConfig(max_epoch=2),
            "accelerator": AcceleratorConfig(cpu=True),
            "checkpoint": None,
            **changes,
        }
    )


def trained(config: ExperimentConfig, **live: Any) -> list[torch.Tensor]:
    built = config.build(**live)
    built.trainer()
    return weights(built.model)


def test_an_experiment_trains_as_its_script() -> None:
    """Built in the documented order with equal seeds, the weights are bit-identical."""
    described = trained(
        experiment(
            optimizer=config_of(
                torch.optim.AdamW,
                lr=0.01,
                groups={"no_decay": ParameterGroup(parameters="norms_and_biases", weight_decay=0)},
            ),
            lr_scheduler=config_of(lr_scheduler.OneCycleLR, max_lr=0.01, total_steps="auto"),
            hooks={
                "log": MetricsLoggerConfig(every="3 steps"),
                "losses": LossTrackerConfig(),
                "val": ValidationHookConfig(),
            },
            data=DataConfig(
                train=spirals(shuffle=True, drop_last=True, num_workers=1),
                evaluation={"val": spirals(seed=1)},
            ),
            accelerator=AcceleratorConfig(cpu=True, gradient_accumulation_steps=2),
            checkpoint=SaveCheckpointConfig(),
        )
    )

    set_seed(3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = DataLoader(Spirals(30), batch_size=4, shuffle=True, drop_last=True)
    model = Noisy()
    groups = {"no_decay": {"parameters": "norms_and_biases", "weight_decay": 0}}
    optimizer = torch.optim.AdamW(parameter_groups(model, groups), lr=0.01)
    HookBasedTrainer(
        accelerator,
        model,
        loader,
        SupervisedProcessor(torch.nn.CrossEntropyLoss()),
        optimizer,
        lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=2 * 4),
        hooks=[LossTrackerConfig()],
        max_epoch=2,
    )()
    assert equal(weights(model), described)


def test_another_seed_trains_other_weights() -> None:
    """The seed determines weights, order and noise."""
    assert equal(trained(experiment()), trained(experiment()))
    assert not equal(trained(experiment()), trained(experiment(seed=4)))


def test_passed_objects_replace_described_parts() -> None:
    """A passed object replaces its part, which is not built and may be null."""
    model = MLP(2, [4], 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    given: dict[str, Any] = {
        "accelerator": Accelerator(cpu=True),
        "dataloader": DataLoader(Spirals(8), batch_size=2),
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": lr_scheduler.StepLR(optimizer, 2),
        "batch_processor": SupervisedProcessor(torch.nn.functional.cross_entropy),
    }
    config = experiment(
        model=None,
        data=DataConfig(train=None),
        batch_processor=None,
        optimizer=None,
        trainer=TrainerConfig(max_step=3),
    )
    built = config.build(
        **given,
        evaluation={"val": [1], "other": None},
        hooks={"stats": StatsMonitorConfig()},
        run_folder="elsewhere",
        resume="never",
    )
    assert {name: getattr(built, name) for name in given} == given
    assert built.evaluation == {"val": [1]}
    assert [*built.hooks] == ["stats"]
    assert built.run_folder == Path("elsewhere")
    built.trainer()
    assert built.trainer.progress.global_step_id == 3


@pytest.mark.parametrize(
    ("changes", "place", "name"),
    [
        ({"model": None}, "model", "model"),
        ({"batch_processor": None}, "batch_processor", "batch_processor"),
        ({"data": DataConfig(train=None)}, "data.train", "dataloader"),
    ],
)
def test_null_part_must_be_passed(changes: dict[str, Any], place: str, name: str) -> None:
    """The error names the argument of build."""
    with pytest.raises(ConfigFieldError, match=rf"build\({name}=\.\.\.\)") as error:
        experiment(**changes).build()
    assert error.value.location == place


def test_hooks_keep_their_order_with_checkpoint_last() -> None:
    """Passed hooks replace hooks of equal names or are appended; None removes a hook."""
    config = experiment(
        hooks={"a": StatsMonitorConfig(), "b": LossTrackerConfig(), "c": MetricsLoggerConfig()},
        checkpoint=SaveCheckpointConfig(),
    )
    own, more = PipelineHooks(), PipelineHooks()
    built = config.build(hooks={"b": own, "c": None, "d": more})
    assert [*built.hooks] == ["a", "b", "d", "checkpoint"]
    assert (built.hooks["b"], built.hooks["d"]) == (own, more)
    names = [hook.name for hook in built.trainer.hooks.all_hooks()]
    assert names[-4:] == ["a", "b", "d", "checkpoint"]
    assert "checkpoint" not in config.build(hooks={"checkpoint": None}).hooks


def test_passed_hook_config_gets_evaluation_sets_but_no_run_folder() -> None:
    """A passed config keeps its own paths and may use the experiment's evaluation sets."""
    best = KeepBestConfig(monitor="eval/val/loss", mode="min", path=Path("best.safetensors"))
    built = experiment(data=DataConfig(train=spirals(), evaluation={"val": spirals(seed=1)})).build(
        hooks={"val": ValidationHookConfig(), "best": best}
    )
    built.trainer()
    assert Path("best.safetensors").exists()


def test_hooks_write_to_the_run_folder(below: Path) -> None:
    """Hooks, their sinks and checkpoints write to the run folder."""
    trained(
        experiment(
            name="spiral",
            hooks={
                "log": MetricsLoggerConfig(sinks=[JsonLinesSinkConfig(path="a/m.jsonl")]),
                "losses": LossTrackerConfig(),
                "val": ValidationHookConfig(),
                "best": KeepBestConfig(
                    monitor="eval/val/loss", mode="min", path=Path("best.safetensors")
                ),
            },
            data=DataConfig(train=spirals(), evaluation={"val": spirals(seed=1)}),
            checkpoint=SaveCheckpointConfig(folder=Path("saves")),
        )
    )
    assert {path.name for path in below.iterdir()} == {"runs"}
    run = below / "runs" / "spiral"
    written = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert {"a/m.jsonl", "best.safetensors", "saves/step_00000016/manifest.json"} <= written


def test_path_out_of_run_folder_is_refused_at_construction() -> None:
    """An escaping path is refused at construction with its path in the document."""
    for sinks, place in (
        ([JsonLinesSinkConfig(path="../m")], "hooks.log.sinks.0.path"),
        ({"x": JsonLinesSinkConfig(path="/m")}, "hooks.log.sinks.x.path"),
    ):
        document = experiment().to_dict()
        document["hooks"] = {"log": MetricsLoggerConfig(sinks=sinks).to_dict()}
        with pytest.raises(ConfigError, match="within the run folder") as error:
            ExperimentConfig.from_dict(document, trust=("torch", __name__))
        assert error.value.location == place


def test_hooks_without_loaders_get_the_evaluation_sets() -> None:
    """Hooks evaluate on all sets or on named sets, unless a hook has its own loaders."""
    config = experiment(
        hooks={
            "all": ValidationHookConfig(sets=["near"]),
            "some": ValidationHookConfig(
                sets=["far"],
                metrics={"accuracy": config_of(MulticlassAccuracy, num_classes=3)},
            ),
            "own": ValidationHookConfig(
                dataloaders={
                    "mine": config_of(DataLoader, dataset=config_of(Spirals, size=4), batch_size=2)
                }
            ),
        },
        data=DataConfig(
            train=spirals(), evaluation={"near": spirals(seed=1), "far": spirals(seed=2)}
        ),
    )
    built = config.build()
    built.trainer()
    evaluated = {name for name in built.trainer.metrics.names() if name.startswith("eval/")}
    assert evaluated == {
        *("eval/near/loss", "eval/far/loss", "eval/far/accuracy", "eval/mine/loss"),
    }


def test_validation_hook_without_sets_is_refused() -> None:
    """A ValidationHook without any evaluation set is refused with its path."""
    with pytest.raises(ConfigFieldError, match=r"add them to data\.evaluation") as error:
        experiment(hooks={"val": ValidationHookConfig()}).build()
    assert error.value.location == "hooks.val"


def test_metrics_are_described_in_the_experiment() -> None:
    """Files hold the metrics of training and evaluation."""
    accuracy = {"accuracy": config_of(MulticlassAccuracy, num_classes=3)}
    config = experiment(
        hooks={
            "log": MetricsLoggerConfig(),
            "train": MetricTrackerConfig(metrics=accuracy),
            "val": ValidationHookConfig(metrics=accuracy),
        },
        data=DataConfig(train=spirals(), evaluation={"val": spirals(seed=1)}),
    )
    again = ExperimentConfig.from_str(
        config.to_str("toml"), "toml", trust=("torch", "torchmetrics", __name__)
    )
    assert again == config
    built = again.build()
    built.trainer()
    names = built.trainer.metrics.names()
    assert {"train/accuracy", "eval/val/accuracy", "eval/val/loss"} <= {*names}


def test_auto_is_the_number_of_lr_scheduler_steps() -> None:
    """ "auto" counts updates, or epochs for an LR scheduler stepped per epoch."""
    one_cycle = config_of(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps="auto")
    cosine = config_of(lr_scheduler.CosineAnnealingLR, T_max="auto", every="epoch")
    accumulating = AcceleratorConfig(cpu=True, gradient_accumulation_steps=3)
    built = experiment(lr_scheduler=one_cycle, accelerator=accumulating).build()
    assert isinstance(built.lr_scheduler, lr_scheduler.OneCycleLR)
    assert built.lr_scheduler.total_steps == 2 * 3
    built.trainer()
    assert built.lr_scheduler.last_epoch == 2 * 3
    built = experiment(lr_scheduler=cosine).build()
    assert isinstance(built.lr_scheduler, lr_scheduler.CosineAnnealingLR)
    assert built.lr_scheduler.T_max == 2
    built.trainer()
    assert built.lr_scheduler.last_epoch == 2


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")
def test_inner_lr_schedulers_get_the_optimizer() -> None:
    """Chained and sequential LR schedulers get the optimizer, and inner counts may be auto.

    SequentialLR of torch 2.8 passes the deprecated argument `epoch` itself, and warns of it.
    """
    linear = config_of(lr_scheduler.LinearLR, total_iters=4)
    cosine = config_of(lr_scheduler.CosineAnnealingLR, T_max="auto")
    sequence = config_of(lr_scheduler.SequentialLR, schedulers=[linear, cosine], milestones=[4])
    chain = config_of(lr_scheduler.ChainedScheduler, schedulers=[linear, sequence])
    built = experiment(lr_scheduler=chain).build()
    built.trainer()
    assert isinstance(built.lr_scheduler, lr_scheduler.ChainedScheduler)
    first, second = built.lr_scheduler._schedulers
    assert isinstance(first, lr_scheduler.LinearLR)
    assert isinstance(second, lr_scheduler.SequentialLR)
    assert second._schedulers[1].T_max == 16  # type: ignore[attr-defined]
    assert first.optimizer is second.optimizer is built.optimizer


class WithKwargs(lr_scheduler.ExponentialLR):
    """LR scheduler that accepts arbitrary arguments."""

    def __init__(self, *args: Any, mode: str = "", **more: Any) -> None:
        self.mode = (mode, more.pop("other", None))
        super().__init__(*args, **more)


def test_lr_scheduler_with_kwargs_passes_the_optimizer_on() -> None:
    """The optimizer is passed, and text arguments stay text, including "auto"."""
    scheduler_config = config_of(WithKwargs, gamma=0.5, mode="auto", other="auto")
    built = experiment(lr_scheduler=scheduler_config).build().lr_scheduler
    assert isinstance(built, WithKwargs)
    assert built.mode == ("auto", "auto")


def halved(move: int) -> float:
    return 0.5


def test_lr_scheduler_accepts_functions_by_name() -> None:
    """A function may apply to all groups, or a list to each group."""
    name = f"{__name__}:halved"
    functions: Any
    for functions in (name, [name]):
        scheduler_config = {
            "class_type": "torch.optim.lr_scheduler:LambdaLR",
            "lr_lambda": functions,
        }
        described = experiment().to_dict() | {"lr_scheduler": scheduler_config}
        built = ExperimentConfig.from_dict(described, trust=__name__).build()
        assert built.lr_scheduler is not None
        assert built.lr_scheduler.get_last_lr() == [0.05]


def test_reduce_on_plateau_steps_once_per_epoch() -> None:
    """The default interval is an epoch, and auto counts epochs."""
    config = config_of(lr_scheduler.ReduceLROnPlateau, patience="auto")
    built = experiment(lr_scheduler=config).build()
    assert isinstance(built.lr_scheduler, lr_scheduler.ReduceLROnPlateau)
    assert built.lr_scheduler.patience == 2


def test_reduce_on_plateau_may_follow_a_metric() -> None:
    """An LR scheduler with ``monitor`` steps with each value of the metric."""
    config = config_of(lr_scheduler.ReduceLROnPlateau, monitor="eval/val/loss")
    assert experiment(lr_scheduler=config).to_dict()["lr_scheduler"]["monitor"] == "eval/val/loss"
    trainer = experiment(lr_scheduler=config).build().trainer
    with pytest.raises(UnknownMetricError, match=r"'eval/val/loss'.*which lr_scheduler waits for"):
        trainer()
    with pytest.raises(PipelineConfigError, match="for ReduceLROnPlateau, found StepLR"):
        experiment(lr_scheduler=config_of(lr_scheduler.StepLR, step_size=1, monitor="x")).build()


class Endless(IterableDataset[tuple[torch.Tensor, int]]):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        while True:
            yield torch.ones(2), 0


def test_auto_without_a_known_length_requests_a_number() -> None:
    """The error names the parameter for data without a length."""
    scheduler_config = config_of(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps="auto")
    endless = DataConfig(train=LoaderConfig(dataset=config_of(Endless)))
    with pytest.raises(ConfigError, match=r"has no length; write a number") as error:
        experiment(lr_scheduler=scheduler_config, data=endless).build()
    assert error.value.location == "lr_scheduler.total_steps"
    limited = TrainerConfig(max_step=5)
    built = experiment(lr_scheduler=scheduler_config, data=endless, trainer=limited).build()
    assert built.lr_scheduler is not None
    assert built.lr_scheduler.total_steps == 5  # type: ignore[attr-defined]
    empty = DataConfig(train=spirals(2, drop_last=True))
    with pytest.raises(DataError, match="2 samples are less than one step") as no_data:
        experiment(lr_scheduler=scheduler_config, data=empty).build()
    assert no_data.value.__notes__ == [
        "while building total_steps",
        "while building lr_scheduler",
    ]


def test_only_the_outermost_lr_scheduler_has_an_interval() -> None:
    """An inner LR scheduler with an interval is refused."""
    step = config_of(lr_scheduler.StepLR, step_size=2, every="epoch")
    scheduler_config = config_of(lr_scheduler.ChainedScheduler, schedulers=[step])
    with pytest.raises(ConfigFieldError, match="outermost LR scheduler") as error:
        experiment(lr_scheduler=scheduler_config).build()
    assert error.value.location == "lr_scheduler.schedulers.0.every"


def doubled(samples: list[tuple[torch.Tensor, int]], times: int = 1) -> Any:
    inputs, arms = zip(*samples * times, strict=True)
    return torch.stack(inputs), torch.tensor(arms)


def test_loader_config_has_the_arguments_of_dataloader() -> None:
    """Samplers get the dataset if they accept one, also within a batch sampler."""
    drawn = config_of(RandomSampler, num_samples=6)
    sampled = spirals(sampler=drawn, collate_fn=config_of(doubled, times=2)).model_copy()
    built = experiment(data=DataConfig(train=sampled)).build()
    assert isinstance(built.dataloader, DataLoader)
    assert [len(arms) for _, arms in built.dataloader] == [8, 4]
    batches = config_of(BatchSampler, sampler=drawn, batch_size=3, drop_last=False)
    dataset = config_of(Spirals, size=30)
    in_batches = LoaderConfig(dataset=dataset, batch_sampler=batches, num_workers=1)
    built = experiment(data=DataConfig(train=in_batches)).build()
    assert isinstance(built.dataloader, DataLoader)
    assert isinstance(built.dataloader.batch_sampler, BatchSampler)
    sampler: Any = built.dataloader.batch_sampler.sampler
    assert sampler.data_source is built.dataloader.dataset
    assert [len(arms) for _, arms in built.dataloader] == [3, 3]


IN_PAIRS = config_of(BatchSampler, sampler=config_of(RandomSampler), batch_size=2, drop_last=False)


@pytest.mark.parametrize(
    ("changes", "place", "says"),
    [
        ({"sampler": config_of(RandomSampler), "shuffle": True}, "sampler", "with shuffle"),
        ({"batch_sampler": IN_PAIRS, "batch_size": 4}, "batch_sampler", "with batch_size"),
        ({"batch_sampler": IN_PAIRS, "drop_last": True}, "batch_sampler", "with drop_last"),
        ({"prefetch_factor": 2}, "prefetch_factor", "num_workers"),
        ({"persistent_workers": True}, "persistent_workers", "num_workers"),
    ],
)
def test_ignored_loader_arguments_are_refused(
    changes: dict[str, Any], place: str, says: str
) -> None:
    """Ignored loader arguments are refused at construction."""
    loader = LoaderConfig(dataset=config_of(Spirals))
    with pytest.raises(ConfigFieldError, match=f"^{place}: .*{says}"):
        loader.replace(**changes)


def forward(model: Any, batch: Any, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, arms = batch
    outputs = model(inputs)
    return outputs, scale * torch.nn.functional.cross_entropy(outputs, arms)


def make_processor(scale: float) -> SimpleBatchProcessor:
    return SimpleBatchProcessor.from_callable(lambda model, batch: forward(model, batch, scale))


def test_a_batch_processor_may_be_a_function() -> None:
    """A function may process a batch, or return a batch processor."""
    expected = trained(experiment())
    assert equal(trained(experiment(batch_processor=config_of(forward))), expected)
    assert equal(trained(experiment(batch_processor=config_of(make_processor, scale=1))), expected)
    scaled = trained(experiment(batch_processor=config_of(forward, scale=2.0)))
    made = trained(experiment(batch_processor=config_of(make_processor, scale=2)))
    assert equal(scaled, made)
    assert not equal(scaled, expected)


def make_sgd(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr)


def test_an_optimizer_may_come_from_a_function() -> None:
    """The function gets the model's parameters."""
    made = trained(experiment(optimizer=config_of(make_sgd, lr=0.1)))
    assert equal(made, trained(experiment()))


def test_parameters_get_the_options_of_their_group() -> None:
    """Unmatched parameters come first, with the optimizer's own options."""
    groups = {
        "biases": ParameterGroup(parameters=["*.bias"], weight_decay=0.0),
        "head": ParameterGroup(parameters=["layers.2.*"], lr=0.5),
    }
    optimizer = config_of(torch.optim.SGD, lr=0.1, weight_decay=0.01, groups=groups)
    built = experiment(optimizer=optimizer).build()
    assert built.optimizer is not None
    found = [
        (len(group["params"]), group["lr"], group["weight_decay"])
        for group in built.optimizer.param_groups
    ]
    assert found == [(1, 0.1, 0.01), (2, 0.1, 0.0), (1, 0.5, 0.01)]
    groups["head"] = ParameterGroup(parameters=["layer.2.*"])
    with pytest.raises(ConfigFieldError, match=r"did you mean 'layers\.2\.\*'") as error:
        experiment(optimizer=optimizer.replace(groups=groups)).build()
    assert error.value.location == "optimizer.groups.head.parameters"


def test_group_options_are_converted_to_the_types_of_the_optimizer() -> None:
    """Group options are converted as the optimizer's own: texts to numbers, lists to tuples."""
    document = experiment().to_dict()
    document["optimizer"] = {
        "class_type": "torch.optim:AdamW",
        "groups": {"all": {"parameters": ["*"], "lr": "0.5", "betas": [0.8, 0.9]}},
    }
    config = ExperimentConfig.from_dict(document, trust=__name__)
    built = config.build()
    assert built.optimizer is not None
    [group] = built.optimizer.param_groups
    assert (group["lr"], group["betas"]) == (0.5, (0.8, 0.9))
    assert ExperimentConfig.from_dict(config.to_dict(), trust=__name__) == config


def test_run_resumes_from_its_checkpoint() -> None:
    """A run resumes from its newest checkpoint, from the beginning, or from a given checkpoint."""
    config = experiment(checkpoint=SaveCheckpointConfig(every="3 steps", keep_last=None))
    stopped = config.replace(**{"trainer.max_epoch": None, "trainer.max_step": 5}).build()
    stopped.trainer()
    third = stopped.run_folder / "checkpoints" / "step_00000003"
    steps = [
        config.build(resume=resume).trainer.progress.global_step_id
        for resume in (None, "never", third)
    ]
    assert steps == [5, 0, 3]
    never = config.replace(resume="never").build()
    assert never.trainer.progress.global_step_id == 0
    resumed = config.build()
    resumed.trainer()
    assert equal(weights(resumed.model), trained(config, resume="never"))


def test_trainer_gets_the_options_of_the_experiment() -> None:
    """The trainer gets limits, data order and precision."""
    config = experiment(
        data=DataConfig(train=spirals(), order=DataOrderConfig(keyed_by="sample")),
        trainer=TrainerConfig(max_optimizer_step=3),
        accelerator=AcceleratorConfig(
            cpu=True, mixed_precision="bf16", find_unused_parameters=True
        ),
    )
    orders = []
    watching = PipelineHooks()
    watching.on_loop.before(lambda args: orders.append(args.run.data.order))
    built = config.build(hooks={"watching": watching})
    assert built.trainer.limits.max_optimizer_step == 3
    assert built.accelerator.mixed_precision == "bf16"
    assert built.accelerator.ddp_handler is not None
    assert built.accelerator.ddp_handler.find_unused_parameters
    built.trainer()
    assert built.trainer.progress.optimizer_step_id == 3
    assert orders == [DataOrder(seed=3, keyed_by="sample")]


class Missing(Spirals):
    def __init__(self) -> None:
        raise FileNotFoundError("no such folder: 'images'")


class Broken(PipelineHooks):
    def __init__(self) -> None:
        raise KeyError("a mistake in it")


def test_build_errors_have_the_path_of_the_part() -> None:
    """Wrong arguments and missing files are errors with a path; other errors get a note."""
    missing = DataConfig(train=LoaderConfig(dataset=config_of(Missing)))
    with pytest.raises(ConfigBuildError, match="no such folder: 'images'") as error:
        experiment(data=missing).build()
    assert error.value.location == "data.train.dataset"
    assert isinstance(error.value.__cause__, FileNotFoundError)
    wrong = spirals(sampler=config_of(RandomSampler, num_samples=-1))
    evaluation = DataConfig(train=spirals(), evaluation={"a": wrong})
    with pytest.raises(ConfigBuildError, match="num_samples should be") as error:
        experiment(data=evaluation).build()
    assert error.value.location == "data.evaluation.a.sampler"
    cyclic = config_of(
        lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=0, cycle_momentum=False
    )
    with pytest.raises(ConfigBuildError, match="ZeroDivisionError") as error:
        experiment(lr_scheduler=cyclic).build()
    assert error.value.location == "lr_scheduler"
    with pytest.raises(KeyError) as mistake:
        experiment(hooks={"mine": config_of(Broken)}).build()
    assert mistake.value.__notes__[-1] == "while building hooks.mine"


class Counting(PipelineHooks):
    """A user's hook without a config class."""

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every, self.seen = every, 0
        self.register_hook("on_step", HookContext.from_callable(after=self.count))

    def count(self, args: Any) -> None:
        self.seen += args.global_step_id % self.every == 0


def test_user_hook_needs_no_config_class() -> None:
    """The constructor's parameters are the hook's fields."""
    built = experiment(hooks={"mine": config_of(Counting, every=4)}).build()
    built.trainer()
    mine = built.hooks["mine"]
    assert isinstance(mine, Counting)
    assert mine.seen == 4
    assert mine.name == "mine"
    assert isinstance(built.trainer, HookBasedTrainer)
    assert not isinstance(mine, ValidationHook)


def test_trackers_get_the_values_of_the_file_as_hyperparameters(below: Path) -> None:
    """TensorBoard's hyperparameters are the experiment's values by dotted path, and the sink's."""
    sink = TrackerSinkConfig(trackers=["tensorboard"], folder="tb", hyperparameters={"note": "a"})
    logger = MetricsLoggerConfig(sinks=[sink])
    built = experiment(hooks={"log": logger}).build()
    built.trainer()
    (found,) = built.run_folder.glob("**/hparams.yml")
    values = yaml.safe_load(found.read_text())
    assert values["seed"] == 3
    assert values["optimizer.lr"] == 0.1
    assert values["data.train.batch_size"] == 4
    assert values["note"] == "a"
