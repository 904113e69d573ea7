"""SAC: actor, two critics with averaged targets, learned temperature; as CleanRL trains it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import Adam
from torch.utils.data import Dataset

from plain_ranks import autocast, average_gradients, rank_and_world_size
from porting import State, logged, trained_state
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
    NamedSteps,
    PipelineHookArgs,
    PipelineHooks,
    SimpleBatchProcessor,
)
from robo_orchard_lab.pipeline.hooks import (
    LossTrackerConfig,
    MetricsLoggerConfig,
    ProgressBarHookConfig,
    SaveCheckpointConfig,
)
from robo_orchard_lab.pipeline.sinks import JsonLinesSinkConfig

# Shared

UPDATES, LEARNING_STARTS, BATCH, POLICY_FREQUENCY = 40, 30, 16, 2
DISCOUNT, TAU, TARGET_ENTROPY = 0.95, 0.05, -1.0
FIELDS = ("obs", "action", "reward", "next_obs", "done")

Batch = dict[str, torch.Tensor]


class Pendulum:
    """Environment: swing a pole up by a torque; the start is random."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.reset()

    def reset(self) -> None:
        self.angle, self.speed = (2 * torch.rand(2, generator=self.generator) - 1).unbind()
        self.time = 0

    @property
    def obs(self) -> torch.Tensor:
        return torch.stack([self.angle.cos(), self.angle.sin(), self.speed])

    def step(self, action: torch.Tensor) -> tuple[torch.Tensor, float, bool]:
        self.speed = (self.speed + 0.1 * (self.angle.sin() + action[0])).clamp(-2, 2)
        self.angle = self.angle + 0.1 * self.speed
        self.time += 1
        cost = self.angle.cos() - 0.1 * self.speed.square() - 0.01 * action[0].square()
        return self.obs, float(cost), self.time == 25

    def state_dict(self) -> dict[str, Any]:
        state = {"angle": self.angle, "speed": self.speed, "time": self.time}
        return {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.angle, self.speed, self.time = state["angle"], state["speed"], state["time"]
        self.generator.set_state(state["generator"])


def mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))


class Updates(Dataset[int]):
    """Data of an experiment file: an item for each update of each rank, replaced by a hook."""

    def __len__(self) -> int:
        return UPDATES * rank_and_world_size()[1]

    def __getitem__(self, index: int) -> int:
        return index


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor = mlp(3, 2)
        self.critics = nn.ModuleList([mlp(4, 1), mlp(4, 1)])
        self.targets = deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(1))

    def act(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return an action of a normal distribution within [-1, 1], and its log probability."""
        mean, log_std = self.actor(obs).chunk(2, -1)
        log_std = log_std.clamp(-5, 2)
        action = torch.tanh(mean + log_std.exp() * noise)
        log_prob = -0.5 * noise.square() - log_std - (1 - action.square() + 1e-6).log()
        return action, log_prob

    def values(self, critics: nn.ModuleList, obs: torch.Tensor, action: torch.Tensor) -> Any:
        return [critic(torch.cat([obs, action], -1))[:, 0] for critic in critics]

    def critics_loss(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            obs = batch["next_obs"]
            action, log_prob = self.act(obs, torch.randn(len(obs), 1))
            best = torch.stack(self.values(self.targets, obs, action)).amin(0)
            best = best - self.log_alpha.exp() * log_prob[:, 0]
            target = batch["reward"] + DISCOUNT * best * ~batch["done"]
        values = self.values(self.critics, batch["obs"], batch["action"])
        return mse_loss(values[0], target) + mse_loss(values[1], target)

    def actor_loss(self, batch: Batch) -> torch.Tensor:
        obs = batch["obs"]
        action, log_prob = self.act(obs, torch.randn(len(obs), 1))
        value = torch.stack(self.values(self.critics, obs, action)).amin(0)
        return (self.log_alpha.exp().detach() * log_prob[:, 0] - value).mean()

    def alpha_loss(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            _, log_prob = self.act(batch["obs"], torch.randn(len(batch["obs"]), 1))
        return (-self.log_alpha.exp() * (log_prob + TARGET_ENTROPY)).mean()

    @torch.no_grad()
    def update_targets(self) -> None:
        for target, value in zip(self.targets.parameters(), self.critics.parameters(), strict=True):
            target.lerp_(value, TAU)


class Experience:
    """Acts in the environment, and keeps the transitions in a replay buffer."""

    def __init__(self, rank: int) -> None:
        self.env = Pendulum(rank)
        self.generator = torch.Generator().manual_seed(100 + rank)
        self.buffer: dict[str, list[torch.Tensor]] = {name: [] for name in FIELDS}
        self.total, self.returns = 0.0, list[float]()

    def next_batch(self, agent: Agent) -> Batch:
        """Act for a step, at first for more, and return random transitions."""
        self.step(agent)
        while (steps := len(self.buffer["obs"])) < LEARNING_STARTS:
            self.step(agent)
        chosen = torch.randint(steps, (BATCH,), generator=self.generator).tolist()
        return {name: torch.stack([kept[i] for i in chosen]) for name, kept in self.buffer.items()}

    @torch.no_grad()
    def step(self, agent: Agent) -> None:
        obs, noise = self.env.obs, torch.randn(1, generator=self.generator)
        is_random = len(self.buffer["obs"]) < LEARNING_STARTS
        action = noise.clamp(-1, 1) if is_random else agent.act(obs, noise)[0]
        next_obs, reward, done = self.env.step(action)
        transition = (obs, action, torch.tensor(reward), next_obs, torch.tensor(done))
        for name, value in zip(FIELDS, transition, strict=True):
            self.buffer[name].append(value)
        self.total += reward
        if done:
            self.returns.append(self.total)
            self.env.reset()
            self.total = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "env": self.env.state_dict(),
            "buffer": {name: torch.stack(kept) for name, kept in self.buffer.items() if kept},
            "generator": self.generator.get_state(),
            "total": self.total,
            "returns": self.returns,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.env.load_state_dict(state["env"])
        self.buffer = {name: [*state["buffer"].get(name, ())] for name in FIELDS}
        self.generator.set_state(state["generator"])
        self.total, self.returns = state["total"], [*state["returns"]]


# Plain loop


def train_plainly(folder: Path, precision: str = "no") -> State:
    torch.manual_seed(0)
    rank, _ = rank_and_world_size()
    agent = Agent()
    experience = Experience(rank)
    critics_optimizer = Adam(agent.critics.parameters(), lr=3e-3)
    actor_optimizer = Adam(agent.actor.parameters(), lr=1e-3)
    alpha_optimizer = Adam([agent.log_alpha], lr=1e-3)
    losses, update, checkpoint = {}, 0, folder / f"agent{rank}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        agent.load_state_dict(saved["agent"])
        critics_optimizer.load_state_dict(saved["critics_optimizer"])
        actor_optimizer.load_state_dict(saved["actor_optimizer"])
        alpha_optimizer.load_state_dict(saved["alpha_optimizer"])
        experience.load_state_dict(saved["experience"])
        torch.set_rng_state(saved["random"])
        update = saved["update"]
    log = (folder / f"log{rank}.jsonl").open("a")
    while update < UPDATES:
        batch = experience.next_batch(agent)
        with autocast(precision):
            losses["critics"] = agent.critics_loss(batch)
        critics_optimizer.zero_grad()
        losses["critics"].backward()
        average_gradients(agent.critics.parameters())
        critics_optimizer.step()
        if update % POLICY_FREQUENCY == 0:
            for _ in range(POLICY_FREQUENCY):
                with autocast(precision):
                    losses["actor"] = agent.actor_loss(batch)
                actor_optimizer.zero_grad()
                losses["actor"].backward()
                average_gradients(agent.actor.parameters())
                actor_optimizer.step()
                with autocast(precision):
                    losses["alpha"] = agent.alpha_loss(batch)
                alpha_optimizer.zero_grad()
                losses["alpha"].backward()
                average_gradients([agent.log_alpha])
                alpha_optimizer.step()
        agent.update_targets()
        update += 1
        if update % 10 == 0:
            record = {name: loss.item() for name, loss in losses.items()}
            if experience.returns:
                record["return"] = sum(experience.returns) / len(experience.returns)
                experience.returns.clear()
            print(f"update {update} of {UPDATES}: {record}")
            log.write(json.dumps(record) + "\n")
        if update % 20 == 0:
            torch.save(
                {
                    "agent": agent.state_dict(),
                    "critics_optimizer": critics_optimizer.state_dict(),
                    "actor_optimizer": actor_optimizer.state_dict(),
                    "alpha_optimizer": alpha_optimizer.state_dict(),
                    "experience": experience.state_dict(),
                    "random": torch.get_rng_state(),
                    "update": update,
                },
                checkpoint,
            )
    log.close()
    optimizers = {"critics": critics_optimizer, "actor": actor_optimizer, "alpha": alpha_optimizer}
    return {
        "model": agent.state_dict(),
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "buffer": experience.state_dict()["buffer"],
    }


# With the trainer


class SAC(SimpleBatchProcessor):
    is_policy_due = True

    def forward(self, model: Agent, batch: Batch) -> NamedSteps:
        if (yield "critics", model.critics_loss(batch)):
            model.update_targets()
        for _ in range(POLICY_FREQUENCY if self.is_policy_due else 0):
            yield "actor", model.actor_loss(batch)
            yield "alpha", model.alpha_loss(batch)


class Rollouts(PipelineHooks):
    """Acts before each step: a loader of several ranks would load a batch ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.experience = Experience(PartialState().process_index)
        self.on_step.before(self.act)
        self.on_step.after(self.publish_returns)

    def act(self, args: PipelineHookArgs) -> None:
        sac, agent = args.run.batch_processor, args.model
        assert isinstance(sac, SAC)
        assert isinstance(agent, Agent)
        sac.is_policy_due = args.global_step_id % POLICY_FREQUENCY == 0
        args.batch = self.experience.next_batch(agent)

    def publish_returns(self, args: PipelineHookArgs) -> None:
        for value in self.experience.returns:
            args.metrics.publish("rollout/return", value)
        self.experience.returns.clear()

    def state_dict(self) -> dict[str, Any]:
        return self.experience.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.experience.load_state_dict(state)


def build(run_folder: Path, resume_from: Any = None, precision: str = "no") -> HookBasedTrainer:
    torch.manual_seed(0)
    agent = Agent()
    log = JsonLinesSinkConfig(path=str(run_folder / "log.jsonl"))
    return HookBasedTrainer(
        Accelerator(cpu=True, mixed_precision=precision),
        agent,
        [None] * UPDATES,
        SAC(),
        {
            "critics": Adam(agent.critics.parameters(), lr=3e-3),
            "actor": Adam(agent.actor.parameters(), lr=1e-3),
            "alpha": Adam([agent.log_alpha], lr=1e-3),
        },
        hooks=[
            ProgressBarHookConfig(),
            LossTrackerConfig(),
            MetricsLoggerConfig(every="10 steps", sinks=[log]),
            Rollouts(),
            SaveCheckpointConfig(every="20 steps"),
        ],
        max_epoch=1,
        run_folder=run_folder,
        resume_from=resume_from,
    )


def state_of(trainer: HookBasedTrainer, run_folder: Path) -> State:
    assert logged(run_folder / "log.jsonl", "rollout/return")
    (rollouts,) = (hook for hook in trainer.hooks.all_hooks() if isinstance(hook, Rollouts))
    return {
        **trained_state(trainer),
        "buffer": rollouts.experience.state_dict()["buffer"],
    }
