"""Rank consistency: settings, gradients and weights that must be equal on all ranks."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import RandomSampler, WeightedRandomSampler

from robo_orchard_core.utils.hook import FunctionInfo
from robo_orchard_lab.pipeline.batch_processor import count_batches
from robo_orchard_lab.pipeline.data.loader import is_map_style
from robo_orchard_lab.pipeline.distributed.collectives import gather_numbers, gather_objects
from robo_orchard_lab.pipeline.errors import PipelineConfigError, PipelineStateError
from robo_orchard_lab.pipeline.gradient_norm import REPLICATED_TYPES
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, TriggeredHook
from robo_orchard_lab.pipeline.model import ddp_of
from robo_orchard_lab.pipeline.pipeline_run import PipelineRun
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES
from robo_orchard_lab.pipeline.run.run_info import hook_configuration, versions
from robo_orchard_lab.pipeline.sharded_tensors import is_sharded
from robo_orchard_lab.pipeline.sharding import is_sharded_model

_ADDRESS = re.compile(r"\(id=\d+\)| at 0x[0-9a-f]+")
_SAME_VERSIONS = ("torch", "accelerate", "robo-orchard-hooks")
_HINT = {
    "hooks": "Register the same hooks with the same configuration on every rank; a hook that acts "
    "on some ranks only can read args.accelerator.process_index"
}


def check_rank_consistency(parts: Mapping[str, str]) -> None:
    """Compare descriptions between all ranks; a collective over host memory.

    Ranks exchange digests of the named descriptions, and the texts only if digests differ.

    Raises:
        PipelineConfigError: on every rank, if ranks differ; the message shows the differences.
    """
    own = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items()}
    digests: list[dict[str, str]] = gather_objects(own)
    names = dict.fromkeys(name for of_rank in digests for name in of_rank)
    different = [name for name in names if len({of.get(name) for of in digests}) > 1]
    if different:
        texts = gather_objects({name: parts.get(name, "nothing\n") for name in different})
        raise PipelineConfigError(
            "the ranks of this job differ, but must be equal, in "
            + "\n".join(
                _difference(name, [of_rank[name] for of_rank in texts]) for name in different
            )
        )


def _difference(name: str, texts: list[str]) -> str:
    """Return a text that groups equal ranks and shows the lines in which groups differ."""
    ranks_of: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        ranks_of.setdefault(text, []).append(str(rank))
    shown = {
        f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}": text for text, ranks in ranks_of.items()
    }
    lines = [f"the {name}."]
    if name == "hooks":  # short enough to be shown in full
        lines += [f"--- {who}:\n{text}" for who, text in shown.items()]
    (first, expected), *others = shown.items()
    for who, text in others:
        lines += difflib.unified_diff(
            expected.splitlines(), text.splitlines(), first, who, n=1, lineterm=""
        )
    return "\n".join([*lines, _HINT.get(name, f"Give every rank the same {name}")])


_COLUMNS = 1021  # prime, so that no common shape aligns with it


class ReplicaCheck:
    """Comparison of gradients and weights between the ranks of a replicated model, as in DDP.

    Ranks compare one number over host memory: the digest of the bits of all parameters, of the
    model and of the optimizer; with the weights also those of modules that the batch processor has
    as attributes. Each comparison reads the parameters once and syncs the device. The trainer
    compares the gradients before its first update, and the weights after each epoch, with each
    checkpoint, and after the last hook. Does nothing in one process and for sharded models.
    """

    def __init__(
        self, run: PipelineRun, names: Callable[[], Mapping[torch.nn.Parameter, str]]
    ) -> None:
        self._run = run
        self._names = names
        kind = run.accelerator.distributed_type
        replicated = kind in REPLICATED_TYPES and not is_sharded_model(run.model)
        self._is_needed = run.accelerator.num_processes > 1 and replicated
        self._checked_step: int | None = None

    def check_gradients(self) -> None:
        """Raise if gradients differ between ranks; a collective.

        Raises:
            PipelineStateError: on every rank; the message names the first different parameter.
        """
        if self._is_needed:
            self._check("gradient", {n: p.grad for p, n in self._names().items()})

    def check_weights(self, *, again: bool = False) -> None:
        """Raise if weights differ between ranks; a collective.

        Args:
            again: compare also if this step's weights were compared: hooks may have changed them.

        Raises:
            PipelineStateError: on every rank; the message names the first different parameter.
        """
        step = self._run.progress.global_step_id
        if self._is_needed and (again or self._checked_step != step):
            names = dict(self._names())
            held = getattr(self._run.batch_processor, "__dict__", {})
            for name, module in held.items():
                if isinstance(module, torch.nn.Module):
                    for path, p in module.named_parameters(f"batch_processor.{name}"):
                        if not (is_sharded(p) or torch.nn.parameter.is_lazy(p)):
                            names.setdefault(p, path)
            self._check("weights", {n: p for p, n in names.items()})
            self._checked_step = step

    def _check(self, what: str, named: Mapping[str, torch.Tensor | None]) -> None:
        ignored = getattr(ddp_of(self._run.model), "parameters_to_ignore", ())
        digests = _digests({n: t for n, t in named.items() if t is not None and n not in ignored})
        packed = json.dumps(digests).encode()
        digest = int.from_bytes(hashlib.blake2b(packed, digest_size=7).digest())
        if len({row[0] for row in gather_numbers([digest])}) == 1:  # a collective
            return
        of_ranks = gather_objects(digests)
        names = dict.fromkeys(name for of_rank in of_ranks for name in of_rank)
        different = [n for n in names if len({of_rank.get(n) for of_rank in of_ranks}) > 1]
        raise PipelineStateError(
            f"the {what} of {different[0]!r} differ{'s' * (what == 'gradient')} between ranks at "
            f"{self._run.progress}, as for {len(different)} of {len(names)} parameters; expected "
            "equal values, which DDP keeps by reducing the gradients of its model. Compute the "
            "loss with the model that the batch processor receives, not by .module of a compiled "
            "model; put all trained parameters, such as those of a loss, into the model; and "
            "change weights and gradients in hooks on every rank in the same way"
        )


def _digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return a digest of the bits of each tensor; a device sync."""
    if not tensors:
        return {}
    with torch.no_grad():
        digests = [_digest(tensor.detach()) for tensor in tensors.values()]
        packed = torch.stack([digest.to(digests[0].device) for digest in digests])
    return dict(zip(tensors, packed.tolist(), strict=True))  # device sync


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """Return a 64-bit number that depends on the values and their positions."""
    if tensor.is_sparse:
        tensor = tensor.coalesce()
        return _digest(tensor.values()) + 3 * _digest(tensor.indices())
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    bits = tensor.reshape(-1).view(torch.uint8)
    if bits.storage_offset() % 8:
        bits = bits.clone()
    count = len(bits) // 8 * 8
    digest = _folded(bits[:count].view(torch.int64))
    return digest if count == len(bits) else digest + 3 * _folded(bits[count:].long())


def _folded(words: torch.Tensor) -> torch.Tensor:
    factors = _factors(words.device)
    rows = len(words) // _COLUMNS
    folded = rows * _COLUMNS
    digest = (words[folded:] * factors[: len(words) - folded]).sum()  # wraps around
    if rows:
        digest += (words[:folded].view(rows, _COLUMNS).sum(0) * factors).sum()
    return digest


@cache
def _factors(device: torch.device) -> torch.Tensor:
    return torch.arange(_COLUMNS, device=device) * 0x1E3779B97F4A7C15 + 1


def describe_setup(
    accelerator: Accelerator,
    model: torch.nn.Module,
    dataloader: Any,
    batch_processor: Any,
    optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer] | None,
    lr_scheduler: LRScheduler | Mapping[str, LRScheduler] | None,
    options: Mapping[str, Any],
) -> dict[str, str]:
    """Describe the arguments of a trainer for :func:`check_rank_consistency`.

    Omits the length of data without an index, which may differ between ranks.
    """
    settings = {
        **options,
        "batch_processor": f"{_processor(batch_processor)}, need_backward="
        f"{batch_processor.need_backward}",
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "mixed_precision": accelerator.mixed_precision,
        "dataloader_config": accelerator.dataloader_config,
    }
    return {
        "versions": _lines({n: v for n, v in versions().items() if n in _SAME_VERSIONS}),
        "settings": _lines(settings),
        "model": "\n".join([_kind(model), *_tensors_of(model)]),
        "optimizer": _of_each(optimizer, lambda each: "\n".join(_optimizer(each, model))),
        "LR scheduler": _of_each(lr_scheduler, _lr_scheduler),
        "data": "\n".join(_data(dataloader)),
    }


def describe_hooks(hooks: PipelineHooks) -> str:
    """Describe all hooks with their configurations, and the functions of each channel."""
    lines = [f"{hook.name}: {_description(hook)}" for hook in hooks.named_hooks()]
    for name in CHANNEL_NAMES:
        for entry in hooks.get_channel(name).entries():
            when = f" when {entry.context.when}" if isinstance(entry.context, TriggeredHook) else ""
            roles = {"before": entry.before, "after": entry.after}
            runs = [f"{role} {_function(f)}" for role, f in roles.items() if f is not None]
            lines.append(f"{name} {entry.position}: {entry.label}, {', '.join(runs)}{when}")
    return _ADDRESS.sub("", "\n".join(lines))


def _function(function: Callable[..., Any]) -> str:
    info = FunctionInfo.of(function)
    if info.file is None:
        return info.name
    # Without the directory, which may differ between machines.
    return f"{info.name} ({os.path.basename(info.file)}:{info.line})"


def _description(hook: PipelineHooks) -> str:
    info, text = hook.rank_consistency_info(), hook_configuration(hook)
    if not isinstance(text, str):
        text = json.dumps(text, sort_keys=True, default=repr)
    return text if info is None else f"{text}, {json.dumps(info, default=repr)}"


def _tensors_of(model: torch.nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kind = "parameter" if parameter.requires_grad else "frozen parameter"
        yield f"{name}: {kind} {_layout(parameter)}"
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield f"{name}: buffer {_layout(buffer)}"


def _layout(tensor: torch.Tensor) -> str:
    """Return the global shape and the dtype."""
    if torch.nn.parameter.is_lazy(tensor):
        return f"uninitialized, {tensor.dtype}"
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _optimizer(optimizer: Any, model: torch.nn.Module) -> Iterator[str]:
    optimizer = getattr(optimizer, "optimizer", optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    yield _kind(optimizer)
    for index, group in enumerate(optimizer.param_groups):
        yield f"group {index}: {_plain(group)}"
        for parameter in group["params"]:
            yield f"  {names.get(id(parameter), f'not in the model, {_layout(parameter)}')}"


def _of_each(given: Any, describe: Callable[[Any], str]) -> str:
    """Describe an object, or several by name."""
    if isinstance(given, Mapping):
        return "\n".join(f"{name}: {describe(each)}" for name, each in given.items())
    return "none" if given is None else describe(given)


def _lr_scheduler(scheduler: Any) -> str:
    scheduler = getattr(scheduler, "scheduler", scheduler)  # of Accelerate's wrapper
    return f"{_kind(scheduler)}\n{_plain(scheduler.state_dict())}"


def _data(dataloader: Any) -> Iterator[str]:
    loader = getattr(dataloader, "base_dataloader", dataloader)
    yield _kind(loader)
    if not is_map_style(loader):
        return
    yield f"dataset: {_kind(loader.dataset)} of {count_batches(loader.dataset)} samples"
    batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    samplers = [batches, getattr(batches, "sampler", None)]
    yield f"sampler: {', '.join(_sampler(each) for each in samplers if each is not None)}"
    size, drop_last = (getattr(batches, name, None) for name in ("batch_size", "drop_last"))
    yield f"{count_batches(loader)} batches of {size} samples, drop_last={drop_last}"


def _processor(processor: Any) -> str:
    """Return the class of a batch processor, with the function behind ``from_callable``."""
    forward = vars(type(processor)).get("forward")
    if not isinstance(forward, staticmethod):
        return _kind(processor)
    return f"{_kind(processor)} of {_ADDRESS.sub('', _function(forward.__func__))}"


def _sampler(sampler: Any) -> str:
    """Return the class of a sampler; for torch's random samplers also size and weights."""
    text = _kind(sampler)
    if type(sampler) in (RandomSampler, WeightedRandomSampler):
        text += f" of {sampler.num_samples}, replacement={sampler.replacement}"
    if type(sampler) is WeightedRandomSampler:
        digest = hashlib.sha256(sampler.weights.numpy(force=True).tobytes()).hexdigest()
        text += f", weights {digest[:12]}"
    return text


def _plain(values: Mapping[str, Any]) -> str:
    """Return the plain values as JSON, without tensors, which would wait for their device."""
    plain = {name: value for name, value in values.items() if _is_plain(value)}
    return json.dumps(plain, sort_keys=True)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _lines(values: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in values.items())


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
