"""DQN with a growing replay buffer, as CleanRL trains it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import mse_loss

from porting import State, logged, trained_state
from robo_orchard_lab.pipeline import (
    HookBasedTrainer,
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

ENV_STEPS, LEARNING_STARTS, TRAIN_EVERY, TARGET_EVERY, BATCH = 150, 30, 3, 8, 16
UPDATES = (ENV_STEPS - LEARNING_STARTS) // TRAIN_EVERY + 1
DISCOUNT = 0.95
FIELDS = ("obs", "action", "reward", "next_obs", "done")

Batch = dict[str, torch.Tensor]


class Corridor:
    """Environment: push a sliding cart to the end of a corridor; the start is random."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.reset()

    def reset(self) -> torch.Tensor:
        start = torch.rand(1, generator=self.generator) - 1.0
        self.obs, self.time = torch.cat([start, torch.zeros(1)]), 0
        return self.obs

    def step(self, action: int) -> tuple[torch.Tensor, float, bool]:
        speed = 0.9 * self.obs[1] + 0.1 * (action - 1)
        self.obs = torch.stack([(self.obs[0] + speed).clamp(-1, 1), speed])
        self.time += 1
        reached = bool(self.obs[0] >= 1)
        return self.obs, 1.0 if reached else -0.01, reached or self.time == 40

    def state_dict(self) -> dict[str, Any]:
        return {"obs": self.obs, "time": self.time, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.obs, self.time = state["obs"], state["time"]
        self.generator.set_state(state["generator"])


class ReplayBuffer:
    """Transitions in the order of time, and random batches of them."""

    def __init__(self) -> None:
        self.transitions: dict[str, list[torch.Tensor]] = {name: [] for name in FIELDS}
        self.generator = torch.Generator().manual_seed(2)

    def add(self, *transition: Any) -> None:
        for name, value in zip(FIELDS, transition, strict=True):
            self.transitions[name].append(torch.as_tensor(value))

    def sample(self) -> Batch:
        size = len(self.transitions["obs"])
        chosen = torch.randint(size, (BATCH,), generator=self.generator).tolist()
        return {n: torch.stack([v[i] for i in chosen]) for n, v in self.transitions.items()}

    def state_dict(self) -> dict[str, Any]:
        stacked = {name: torch.stack(values) for name, values in self.transitions.items() if values}
        return {"transitions": stacked, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.transitions = {name: [] for name in FIELDS}
        self.transitions |= {name: [*values] for name, values in state["transitions"].items()}
        self.generator.set_state(state["generator"])


class Agent(nn.Module):
    """Network for the values of actions, and the copy of it that provides targets."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))
        self.target = deepcopy(self.q).requires_grad_(False)

    def loss(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            best = self.target(batch["next_obs"]).amax(1)
            target = batch["reward"] + DISCOUNT * best * ~batch["done"]
        values = self.q(batch["obs"]).gather(1, batch["action"][:, None])[:, 0]
        return mse_loss(values, target)


class Actor:
    """Acts in the environment and keeps the transitions; explores less and less."""

    def __init__(self, agent: Agent) -> None:
        self.agent, self.env, self.buffer = agent, Corridor(), ReplayBuffer()
        self.generator = torch.Generator().manual_seed(3)
        self.steps, self.total = 0, 0.0
        self.returns: list[float] = []

    @torch.no_grad()
    def choose(self, obs: torch.Tensor) -> int:
        epsilon = max(1.0 - 0.95 * self.steps / (0.5 * ENV_STEPS), 0.05)
        if torch.rand(1, generator=self.generator).item() < epsilon:
            return int(torch.randint(3, (1,), generator=self.generator))
        return int(self.agent.q(obs).argmax())

    def step(self) -> None:
        obs = self.env.obs
        action = self.choose(obs)
        next_obs, reward, done = self.env.step(action)
        self.buffer.add(obs, action, reward, next_obs, done)
        self.total += reward
        self.steps += 1
        if done:
            self.returns.append(self.total)
            self.env.reset()
            self.total = 0.0

    @property
    def is_batch_due(self) -> bool:
        return self.steps >= LEARNING_STARTS and self.steps % TRAIN_EVERY == 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "env": self.env.state_dict(),
            "buffer": self.buffer.state_dict(),
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "total": self.total,
            "returns": self.returns,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.env.load_state_dict(state["env"])
        self.buffer.load_state_dict(state["buffer"])
        self.generator.set_state(state["generator"])
        self.steps, self.total = state["steps"], state["total"]
        self.returns = list(state["returns"])


# Plain loop


def train_plainly(folder: Path) -> State:
    torch.manual_seed(0)
    agent = Agent()
    optimizer = torch.optim.Adam(agent.q.parameters(), lr=1e-2)
    actor = Actor(agent)
    updates, losses, checkpoint = 0, [], folder / "agent.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        actor.load_state_dict(saved["actor"])
        updates, losses = saved["updates"], saved["losses"]
    log = (folder / "log.jsonl").open("a")
    while actor.steps < ENV_STEPS:
        actor.step()
        if actor.is_batch_due:
            loss = agent.loss(actor.buffer.sample())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updates += 1
            losses.append(loss.item())
            if updates % TARGET_EVERY == 0:
                agent.target.load_state_dict(agent.q.state_dict())
            if updates % 10 == 0:
                record = {"update": updates, "loss": sum(losses) / len(losses)}
                if actor.returns:
                    record["return"] = sum(actor.returns) / len(actor.returns)
                print(f"update {updates} of {UPDATES}: {record}")
                log.write(json.dumps(record) + "\n")
                losses.clear()
                actor.returns.clear()
            if updates % 20 == 0 or updates == UPDATES:
                torch.save(
                    {
                        "agent": agent.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "actor": actor.state_dict(),
                        "updates": updates,
                        "losses": losses,
                    },
                    checkpoint,
                )
    log.close()
    return {
        "model": agent.state_dict(),
        "optimizer": optimizer.state_dict(),
        "buffer": actor.buffer.state_dict(),
        "env": actor.env.state_dict(),
    }


# With the trainer


class Experience(Actor):
    def __iter__(self) -> Iterator[Batch]:
        while self.steps < ENV_STEPS:
            self.step()
            if self.is_batch_due:
                yield self.buffer.sample()


class QLearning(SimpleBatchProcessor):
    def forward(self, model: Agent, batch: Batch) -> tuple[None, torch.Tensor]:
        return None, model.loss(batch)


def build(run_folder: Path, resume_from: Any = None) -> HookBasedTrainer:
    torch.manual_seed(0)
    agent = Agent()
    experience = Experience(agent)
    rules = PipelineHooks("agent")

    @rules.on_optimizer_step.after(when=f"{TARGET_EVERY} optimizer steps")
    def update_target(args: PipelineHookArgs) -> None:
        agent.target.load_state_dict(agent.q.state_dict())

    @rules.on_step.after
    def publish_returns(args: PipelineHookArgs) -> None:
        for value in experience.returns:
            args.metrics.publish("rollout/return", value)
        experience.returns.clear()

    log = JsonLinesSinkConfig(path=str(run_folder / "log.jsonl"))
    return HookBasedTrainer(
        Accelerator(cpu=True),
        agent,
        experience,
        QLearning(),
        torch.optim.Adam(agent.q.parameters(), lr=1e-2),
        hooks=[
            ProgressBarHookConfig(),
            LossTrackerConfig(),
            MetricsLoggerConfig(every="10 steps", sinks=[log]),
            rules,
            SaveCheckpointConfig(every="20 steps"),
        ],
        max_epoch=1,
        run_folder=run_folder,
        resume_from=resume_from,
    )


def state_of(trainer: HookBasedTrainer, run_folder: Path) -> State:
    experience = trainer.dataloader
    assert isinstance(experience, Experience)
    assert logged(run_folder / "log.jsonl", "rollout/return")
    return {
        **trained_state(trainer),
        "buffer": experience.buffer.state_dict(),
        "env": experience.env.state_dict(),
    }
