"""The hook that measures the success rate during training."""

from __future__ import annotations

import json
import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.policy.test_rollouts import alive

from launching import SCRIPTS, launch
from reaching import make_reach, make_without_package, processes_in, reach
from reaching_policy import ReachPolicy, make_policy_trainer
from robo_orchard_core.utils.config import ConfigError, config_of
from robo_orchard_lab.pipeline import PipelineHookArgs, PipelineHooks
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hooks import (
    EarlyStoppingConfig,
    EMAConfig,
    KeepBestConfig,
    MetricsLoggerConfig,
    SaveModelConfig,
)
from robo_orchard_lab.policy import (
    RolloutError,
    RolloutEvaluationConfig,
    load_policy,
    rollout,
)
from tiny import equal, make_trainer, weights

SCRIPT = SCRIPTS / "rollouts_on_ranks.py"


class Records(PipelineHooks):
    """Hook that keeps the values of each record by step."""

    def __init__(self) -> None:
        super().__init__("records")
        self.found: dict[int, dict[str, float]] = {}
        self.register_for_loop(lambda args: args.metrics.listen(self._note))

    def _note(self, record: Any) -> None:
        for value in record.values:
            if value.name.startswith("eval/"):
                self.found.setdefault(value.step, {})[value.name] = value.value


def evaluation(**fields: Any) -> RolloutEvaluationConfig:
    return RolloutEvaluationConfig(
        **{"environment": reach(), "every": "2 steps", "episodes": 4, "environments": 2, **fields}
    )


def test_success_is_published_at_its_steps(tmp_path: Path) -> None:
    """Each evaluation publishes rate, interval and length; the best weights are kept by them."""
    trace = tmp_path / "trace"
    records = Records()
    policy = ReachPolicy(gain=0.0)
    hooks = [
        evaluation(environment=reach(trace=str(trace)), max_episode_steps=10, at_start=True),
        KeepBestConfig(
            monitor="eval/pc_success", mode="max", path=tmp_path / "best" / "model.safetensors"
        ),
        MetricsLoggerConfig(every="1 step"),
        records,
    ]
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.4)
    trainer = make_policy_trainer(hooks, policy, optimizer=optimizer, max_step=4)
    trainer()
    assert [*records.found] == [0, 2, 4]
    first, last = records.found[0], records.found[4]
    assert (first["eval/pc_success"], first["eval/episode_length"]) == (0.0, 10.0)
    assert (first["eval/pc_success_low"], last["eval/pc_success_high"]) == (0.0, 100.0)
    assert first["eval/pc_success_high"] == pytest.approx(48.99, abs=0.01)
    assert (last["eval/pc_success"], last["eval/rollout_errors"]) == (100.0, 0.0)
    assert last["eval/episode_length"] < 10
    assert len(processes_in(trace)) == 2
    assert not alive(trace)
    best = load_policy(tmp_path / "best", trust="reaching_policy")
    assert rollout(best, reach(), range(4)).pc_success == 100.0


def test_training_is_as_without_rollouts(tmp_path: Path) -> None:
    """Weights and random numbers are those of a run without the hook."""

    def trained(hooks: list[Any]) -> tuple[list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(3)
        policy = ReachPolicy(gain=0.2, noise=0.1)
        make_policy_trainer(hooks, policy, run_folder=tmp_path / f"{len(hooks)}", max_step=3)()
        return weights(policy), torch.rand(3)

    plain, numbers = trained([])
    found, after = trained([evaluation(every="1 step", at_start=True)])
    assert equal(plain, found)
    assert torch.equal(numbers, after)


def test_named_weights_are_evaluated() -> None:
    """With weights="EMA", the episodes are those of the averaged weights, which lag behind."""
    records = Records()
    hooks = {
        "EMA": EMAConfig(decay=0.999),
        "ema": evaluation(every="4 steps", weights="EMA", label="ema", max_episode_steps=10),
        "own": evaluation(every="4 steps", max_episode_steps=10),
        "log": MetricsLoggerConfig(every="1 step"),
        "records": records,
    }
    policy = ReachPolicy(gain=0.0)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.4)
    make_policy_trainer(hooks, policy, optimizer=optimizer, max_step=4)()
    found = records.found[4]
    assert (found["eval/ema/pc_success"], found["eval/pc_success"]) == (0.0, 100.0)
    with pytest.raises(PipelineConfigError, match="no hook named 'EMB' keeps weights"):
        make_policy_trainer([EMAConfig(), evaluation(weights="EMB")], ReachPolicy(), max_step=2)()


def test_videos_and_a_table_are_reported(tmp_path: Path) -> None:
    """The run folder gets the first success, the first failure, and the list of episodes."""
    hooks = [
        evaluation(environment=reach(render=True), episodes=8, max_episode_steps=4, every=None)
    ]
    make_policy_trainer(hooks, ReachPolicy(), run_folder=tmp_path, max_step=1)()
    lines = (tmp_path / "media" / "index.jsonl").read_text().splitlines()
    entries = {entry["name"]: entry for entry in map(json.loads, lines)}
    found = rollout(ReachPolicy(), reach(), range(8), max_episode_steps=4)
    for kind, is_success in (("success", True), ("failure", False)):
        first = next(each for each in found.episodes if each.is_success == is_success)
        entry = entries[f"eval/{kind}"]
        assert entry["caption"] == f"seed {first.seed}: {kind} after {first.length} steps"
        assert entry["fps"] == 20
        assert (tmp_path / "media" / entry["file"]).stat().st_size > 100
    rows = (tmp_path / "media" / entries["eval/episodes"]["file"]).read_text().splitlines()
    assert rows[0] == "seed,success,steps,error"
    assert len(rows) == 9


@pytest.mark.parametrize("fault", [None, "no_gl"])
def test_videos_are_skipped_or_required(
    fault: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a renderer, one log line says why there are no videos, or the run fails."""
    environment = reach(render=fault is not None, fault=fault)
    hook = evaluation(environment=environment, every="1 step")
    with caplog.at_level(logging.WARNING):
        make_policy_trainer([hook], ReachPolicy(), run_folder=tmp_path, max_step=3)()
    [line] = [record.getMessage() for record in caplog.records if "videos" in record.getMessage()]
    assert ("cannot create a GL context" if fault else "render_mode 'rgb_array'") in line
    required = evaluation(environment=environment, require_videos=True)
    with pytest.raises(PipelineConfigError, match="videos: no video"):
        make_policy_trainer([required], ReachPolicy(), run_folder=tmp_path / "2", max_step=3)()


def test_an_environment_that_is_not_repeatable_is_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A video whose episode ends otherwise than before is logged, with its seed."""
    environment = reach(render=True, drifts=True)
    hook = evaluation(environment=environment, every=None, videos=2)
    make_policy_trainer([hook], ReachPolicy(), run_folder=tmp_path, max_step=1)()
    assert "reset(seed=...) of the environment is not repeatable" in caplog.text


BEFORE_THE_FIRST_STEP: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no policy": (None, {}, "expected a policy with predict_actions"),
    "missing package": (
        ReachPolicy(),
        {"environment": make_without_package},
        r"environment: the environment can't be created: .*pip install",
    ),
    "lambda": (
        ReachPolicy(),
        {"environment": lambda: make_reach()},
        "expected a function that a worker process can import",
    ),
    "other action space": (
        ReachPolicy(action_size=3),
        {},
        "environment: the policy does not fit the environment",
    ),
}


@pytest.mark.parametrize(
    ("policy", "fields", "message"), BEFORE_THE_FIRST_STEP.values(), ids=BEFORE_THE_FIRST_STEP
)
def test_wrong_settings_are_found_before_the_first_step(
    policy: Any, fields: dict[str, Any], message: str
) -> None:
    """The run fails before a step, though the first evaluation is far away."""
    hook = evaluation(every="1000 steps", **fields)
    make = make_trainer if policy is None else partial(make_policy_trainer, policy=policy)
    trainer = make([hook], max_step=3)
    with pytest.raises(PipelineConfigError, match=message):
        trainer()
    assert trainer.progress.global_step_id == 0


def test_two_hooks_need_a_label() -> None:
    """Two evaluations with the same names of metrics are refused."""
    hooks = {"a": evaluation(), "b": evaluation()}
    with pytest.raises(PipelineConfigError, match="b: a publishes eval/pc_success as well"):
        make_policy_trainer(hooks, ReachPolicy(), max_step=2)()
    with pytest.raises(ValueError, match="expected a name without '/'"):
        evaluation(label="a/b")


def test_a_failed_episode_ends_the_run_or_is_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With on_error="record" the run goes on, and log and metrics have the failed episode."""
    trace = tmp_path / "trace"
    broken = reach(fault="die", fault_seed=2, fault_step=1, trace=str(trace))
    trainer = make_policy_trainer([evaluation(environment=broken)], ReachPolicy(), max_step=4)
    with pytest.raises(RolloutError, match=r"seed 2, step 0: .* exit code 7"):
        trainer()
    assert trainer.progress.global_step_id == 2
    assert not alive(trace)
    records = Records()
    hooks = [
        evaluation(environment=broken, on_error="record"),
        MetricsLoggerConfig(every="1 step"),
        records,
    ]
    make_policy_trainer(hooks, ReachPolicy(), max_step=4)()
    for step in (2, 4):
        assert records.found[step]["eval/pc_success"] == 75.0
        assert records.found[step]["eval/rollout_errors"] == 1.0
    assert "episode failed: seed 2, step 0: the process of the environment ended" in caplog.text
    assert not alive(trace)


def test_other_hooks_use_the_success_rate() -> None:
    """EarlyStopping stops at a success rate; a request of a hook evaluates."""
    asks = PipelineHooks("asks")

    @asks.on_step.after(when="1 step")
    def ask(args: PipelineHookArgs) -> None:
        args.requests.evaluate("always")

    hooks = [
        asks,
        evaluation(every=None, at_end=False),
        EarlyStoppingConfig(monitor="eval/pc_success", mode="max", patience=9, stop_on=100.0),
    ]
    trainer = make_policy_trainer(hooks, ReachPolicy(), max_step=4)
    trainer()
    assert trainer.progress.global_step_id == 1


def test_ranks_share_the_episodes(tmp_path: Path) -> None:
    """At each world size, also without episodes for a rank, the values are identical."""
    found = []
    for processes in (1, 3):
        folder = tmp_path / f"{processes}"
        folder.mkdir()
        launch(SCRIPT, folder, processes=processes)
        ranks = [json.loads((folder / f"rank{r}.json").read_text()) for r in range(processes)]
        assert len({*processes_in(folder / "trace")}) == (2 if processes == 1 else 4)
        found += ranks
    assert all(values == found[0] for values in found)
    assert 0 < found[0]["eval/pc_success"] < 100


def test_the_environment_of_a_file_is_not_called_by_the_trainer(tmp_path: Path) -> None:
    """A function with arguments in a document reaches the workers as a picklable factory."""
    document = {
        "class_type": "robo_orchard_lab.policy.rollout_evaluation:RolloutEvaluation",
        "environment": {"func": "reaching:make_reach", "limit": 3, "trace": str(tmp_path / "t")},
        "every": "1 step",
        "episodes": 2,
        "environments": 1,
        "videos": 0,
    }
    config = RolloutEvaluationConfig.from_dict(document, trust="reaching")
    assert config.to_dict()["environment"]["func"] == "reaching:make_reach"
    with pytest.raises(ConfigError, match="reaching"):
        RolloutEvaluationConfig.from_dict(document)
    hook = config()
    assert not (tmp_path / "t").exists()
    make_policy_trainer([hook], ReachPolicy(), max_step=1)()
    assert len(processes_in(tmp_path / "t")) == 1
    assert os.getpid() not in processes_in(tmp_path / "t")
    same = evaluation(environment=config_of(make_reach, limit=3))
    make_policy_trainer([same], ReachPolicy(), max_step=2)()


def test_the_exported_model_is_the_policy(tmp_path: Path) -> None:
    """SaveModel writes a folder that load_policy reads."""
    policy = ReachPolicy(gain=0.25)
    hooks = [SaveModelConfig(folder=tmp_path / "pretrained_model")]
    make_policy_trainer(hooks, policy, max_step=2)()
    loaded = load_policy(tmp_path, trust="reaching_policy")
    assert loaded.gain.item() == policy.gain.item() != 0.25
    assert not loaded.training
    assert load_file(tmp_path / "pretrained_model" / "model.safetensors").keys() == {"gain"}
