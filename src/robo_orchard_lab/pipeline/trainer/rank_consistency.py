"""What has to be alike on all ranks, compared ahead of the collectives that rely on it."""

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
    "hooks": "Register the same hooks with the same configuration on every rank; one that is to "
    "act on some ranks only can look at args.accelerator.process_index"
}


def check_rank_consistency(parts: Mapping[str, str]) -> None:
    """Refuse to go on where ranks differ in something: a collective, over the host's memory.

    They exchange digests, and texts only where those differ.

    Args:
        parts: what is compared, as text that is the same on all ranks, by a name for people.

    Raises:
        PipelineConfigError: on every rank; it says in what which ranks differ, and shows all.
    """
    own = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items()}
    digests: list[dict[str, str]] = gather_objects(own)
    names = dict.fromkeys(name for of_rank in digests for name in of_rank)
    different = [name for name in names if len({of.get(name) for of in digests}) > 1]
    if different:
        texts = gather_objects({name: parts.get(name, "nothing\n") for name in different})
        raise PipelineConfigError(
            "the ranks of this job differ in what has to be alike on all of them: "
            + "\n".join(
                _difference(name, [of_rank[name] for of_rank in texts]) for name in different
            )
        )


def _difference(name: str, texts: list[str]) -> str:
    """What the ranks have, those with the same together, and the lines in which they differ."""
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


def setup_texts(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    lr_scheduler: LRScheduler | None,
    dataloader: Any,
    batch_processor: Any,
    **options: Any,
) -> dict[str, str]:
    """What a trainer is made of, for :func:`check_rank_consistency`.

    The lengths of data without an index are left out: there, each rank may have its own.
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
        "schedule": "none" if lr_scheduler is None else _schedule(lr_scheduler),
        "data": "\n".join(_data(dataloader)),
    }


def hook_text(hooks: PipelineHooks) -> str:
    """Which hooks there are, with their configurations, and what runs in each channel."""
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
    # Without the folder: each machine may have its own.
    return f"{info.name} ({os.path.basename(info.file)}:{info.line})"


def _description(hook: PipelineHooks) -> str:
    beside = hook.rank_consistency_info()
    text = _configuration(hook)
    return text if beside is None else f"{text}, {json.dumps(beside, default=repr)}"


def _configuration(hook: PipelineHooks) -> str:
    configuration = getattr(hook, "cfg", None)
    if isinstance(configuration, Config):
        try:
            return json.dumps(configuration.to_dict(), sort_keys=True, default=repr)
        except ConfigSaveError:  # it holds a class that is made in a function, say
            return _kind(configuration)
    return _kind(hook)


def _tensors_of(model: torch.nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kind = "parameter" if parameter.requires_grad else "frozen parameter"
        yield f"{name}: {kind} {_layout(parameter)}"
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield f"{name}: buffer {_layout(buffer)}"


def _layout(tensor: torch.Tensor) -> str:
    """The whole shape, where the tensor is in parts on several ranks, and the type."""
    if torch.nn.parameter.is_lazy(tensor):
        return f"of no shape yet, {tensor.dtype}"
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


def _schedule(lr_scheduler: Any) -> str:
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
    """Its class, or the function that it was made of."""
    forward = vars(type(processor)).get("forward")
    if not isinstance(forward, staticmethod):
        return _kind(processor)
    return f"{_kind(processor)} of {_ADDRESS.sub('', _function(forward.__func__))}"


def _sampler(sampler: Any) -> str:
    """Its class; of torch's own that draw, also how many they draw, and by which weights."""
    text = _kind(sampler)
    if type(sampler) in (RandomSampler, WeightedRandomSampler):
        text += f" of {sampler.num_samples}, replacement={sampler.replacement}"
    if type(sampler) is WeightedRandomSampler:
        digest = hashlib.sha256(sampler.weights.numpy(force=True).tobytes()).hexdigest()
        text += f", weights {digest[:12]}"
    return text


def _plain(values: Mapping[str, Any]) -> str:
    """The numbers and texts among some values; reading tensors would wait for their device."""
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
