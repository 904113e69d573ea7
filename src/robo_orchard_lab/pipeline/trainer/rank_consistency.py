"""Rank consistency: settings that must be equal on all ranks, compared before collectives."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import RandomSampler, WeightedRandomSampler

from robo_orchard_core.utils.config import Config, ConfigSaveError
from robo_orchard_core.utils.hook import FunctionInfo
from robo_orchard_lab.pipeline.batch_processor import count_batches
from robo_orchard_lab.pipeline.data.loader import is_map_style
from robo_orchard_lab.pipeline.distributed.collectives import gather_objects
from robo_orchard_lab.pipeline.errors import PipelineConfigError
from robo_orchard_lab.pipeline.hook_set import PipelineHooks, TriggeredHook
from robo_orchard_lab.pipeline.progress import CHANNEL_NAMES
from robo_orchard_lab.pipeline.run.run_info import versions

_ADDRESS = re.compile(r"\(id=\d+\)| at 0x[0-9a-f]+")
_SAME_VERSIONS = ("torch", "accelerate", "robo-orchard-hooks")
_HINT = {
    "hooks": "Register the same hooks with the same configuration on every rank; a hook that acts "
    "on some ranks only can read args.accelerator.process_index"
}


def check_rank_consistency(parts: Mapping[str, str]) -> None:
    """Compare descriptions between all ranks; a collective over host memory.

    Ranks exchange digests, and the texts only if digests differ.

    Args:
        parts: description by name, such as ``{"model": "..."}``.

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


def describe_setup(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    lr_scheduler: LRScheduler | None,
    dataloader: Any,
    batch_processor: Any,
    **options: Any,
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
        "optimizer": "\n".join(_optimizer(optimizer, model)),
        "LR scheduler": "none" if lr_scheduler is None else _lr_scheduler(lr_scheduler),
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
    info = hook.rank_consistency_info()
    text = _configuration(hook)
    return text if info is None else f"{text}, {json.dumps(info, default=repr)}"


def _configuration(hook: PipelineHooks) -> str:
    configuration = getattr(hook, "cfg", None)
    if isinstance(configuration, Config):
        try:
            return json.dumps(configuration.to_dict(), sort_keys=True, default=repr)
        except ConfigSaveError:  # for example a class defined in a function
            return _kind(configuration)
    return _kind(hook)


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
    if optimizer is None:
        yield "none"
        return
    optimizer = getattr(optimizer, "optimizer", optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    yield _kind(optimizer)
    for index, group in enumerate(optimizer.param_groups):
        yield f"group {index}: {_plain(group)}"
        for parameter in group["params"]:
            yield f"  {names.get(id(parameter), f'not in the model, {_layout(parameter)}')}"


def _lr_scheduler(lr_scheduler: Any) -> str:
    lr_scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
    return f"{_kind(lr_scheduler)}\n{_plain(lr_scheduler.state_dict())}"


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
