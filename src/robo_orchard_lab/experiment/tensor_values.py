"""How values of torch's that are neither plain data nor parts stand in files."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from robo_orchard_core.utils.config.errors import shown
from robo_orchard_core.utils.config.parts import DECLARATIONS, UNDECLARED


def _data_type(value: Any) -> Any:
    """``torch.float32`` of ``"float32"``."""
    import torch

    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."), value)
    if not isinstance(value, torch.dtype):
        raise ValueError(f"expected a data type of tensors, like 'float32', found {shown(value)}")
    return value


def _device(value: Any) -> Any:
    """``torch.device("cuda", 0)`` of ``"cuda:0"``."""
    import torch

    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"expected a device, like 'cuda:0', found {shown(value)}") from error


def _as_text(value: Any) -> str:
    return str(value).removeprefix("torch.")


DataType = Annotated[
    Any, PlainValidator(_data_type, json_schema_input_type=str), PlainSerializer(_as_text)
]
Device = Annotated[
    Any, PlainValidator(_device, json_schema_input_type=str), PlainSerializer(_as_text)
]

DECLARATIONS["torch:dtype"] = DataType
DECLARATIONS["torch:device"] = Device
UNDECLARED["torch", "dtype"] = DataType | None  # as all layers have them
UNDECLARED["torch", "device"] = Device | None
DECLARATIONS["torch:Tensor"] = None
DECLARATIONS["torch._C:Generator"] = None
