"""Find the named losses in what a batch processor returns as outputs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from robo_orchard_lab.pipeline.errors import PipelineConfigError


def named_losses(outputs: Any, key: str, names: Sequence[str] | None) -> Iterable[tuple[str, Any]]:
    """Pairs of a name and a loss.

    >>> outputs = {"boxes": [], "losses": {"box": 0.5, "class": 2.0}}
    >>> list(named_losses(outputs, "losses", None))
    [('box', 0.5), ('class', 2.0)]

    Args:
        outputs: a mapping, or an object with attributes, that has the mapping of losses.
        key: where in the outputs it is; '' where they are that mapping themselves.
        names: which of the losses to give; None for all.

    Raises:
        PipelineConfigError: there is no mapping, or it has none of such a name.
    """
    losses = _part_of(outputs, key) if key else outputs
    if not isinstance(losses, Mapping):
        raise _no_mapping(outputs, key, losses)
    if names is None:
        return losses.items()
    try:
        return [(name, losses[name]) for name in names]
    except KeyError as error:
        raise _no_such_loss(str(error.args[0]), losses) from None


def _part_of(outputs: Any, key: str) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get(key)
    return getattr(outputs, key, None)


def _no_mapping(outputs: Any, key: str, found: Any) -> PipelineConfigError:
    parts = outputs if isinstance(outputs, Mapping) else getattr(outputs, "__dict__", {})
    return PipelineConfigError(
        f"losses_key={key!r} must lead to a mapping from names to losses, found "
        f"{type(found).__name__}. The outputs of the batch processor are a "
        f"{type(outputs).__name__} with: {', '.join(map(str, parts)) or 'no names'}. "
        "Give the name of its mapping, or '' where the outputs are that mapping themselves"
    )


def _no_such_loss(name: str, losses: Mapping[Any, Any]) -> PipelineConfigError:
    near = difflib.get_close_matches(name, map(str, losses), n=1)
    return PipelineConfigError(
        f"loss_names has {name!r}, which is not among the losses"
        + (f"; did you mean {near[0]!r}?" if near else ".")
        + f" They are: {', '.join(map(str, losses)) or 'none'}"
    )
