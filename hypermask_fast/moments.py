"""In which dtype Adam keeps the moments of the hypernetwork's dense output layer."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .dense import HyperNetwork
from .errors import InputError

MOMENTS = ("float32", "bfloat16")
_LARGEST, _LEAST = torch.finfo(torch.bfloat16).max, 2.0**-133


def check(moments: str, net: HyperNetwork, amsgrad: bool) -> None:
    """Raises InputError where the output layer's moments can't be kept so."""
    if moments not in MOMENTS:
        raise InputError(f"moments must be one of {', '.join(MOMENTS)}, not {moments!r}")
    if moments == "float32":
        return
    if not net.factored:
        raise InputError(f"moments={moments!r} are of a dense output layer, and this hypernetwork generates in chunks")
    if amsgrad:
        raise InputError(f"moments={moments!r} don't go together with amsgrad, whose largest moment only float32 keeps")
    if net.output.weight.dtype != torch.float32:
        dtype = str(net.output.weight.dtype).removeprefix("torch.")
        raise InputError(f"moments={moments!r} are of a float32 output layer, this one is {dtype}")


def stored_dtype(state_dict: dict[str, Any], parameters: Iterable[Tensor], parameter: Tensor) -> torch.dtype | None:
    """Of a parameter's moments in a state_dict whose groups are those of `parameters`; None where it has none."""
    numbers = (number for group in state_dict["param_groups"] for number in group["params"])
    number = next((n for n, p in zip(numbers, parameters, strict=True) if p is parameter), None)
    moment = state_dict["state"].get(number, {}).get("exp_avg")
    return None if moment is None else moment.dtype


def check_shapes(state_dict: dict[str, Any], parameters: Iterable[Tensor]) -> None:
    """Raises InputError where a state_dict has moments of other shapes than the parameters of its places."""
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=False):  # how many there are PyTorch looks at
        for name, value in state_dict["state"].get(number, {}).items():
            if name != "step" and isinstance(value, Tensor) and value.shape != parameter.shape:
                raise InputError(
                    f"the state is of another model: parameter {number} is {tuple(parameter.shape)} here, and its "
                    f"{name} is {tuple(value.shape)}"
                )


def convert(state: dict[str, Any], dtype: torch.dtype, stored: torch.dtype | None) -> None:
    """Makes a loaded layer's moments those of its optimiser; a warning says so where they were stored in another dtype.

    Args:
        state: of the layer's weight, as torch.optim.Optimizer.load_state_dict leaves it: in the weight's dtype.
        dtype: of the moments here; stored: of those in the state_dict, None where there are none.
    """
    if stored is None:
        return
    if dtype == torch.bfloat16:
        first, second = state["exp_avg"], state["exp_avg_sq"]
        state["exp_avg"] = _cast(first)
        rounded = _cast(second)
        state["exp_avg_sq"] = torch.where((rounded == 0) & (second > 0), _LEAST, rounded)  # it is divided by
    if torch.bfloat16 in (dtype, stored) and dtype != stored:
        names = [str(each).removeprefix("torch.") for each in (stored, dtype)]
        warnings.warn(
            f"the moments of the output layer were kept in {names[0]} and are converted to {names[1]}", stacklevel=3
        )


def _cast(moment: Tensor) -> Tensor:
    """To the nearest bfloat16, of finite values a finite one."""
    return moment.clamp(-_LARGEST, _LARGEST).to(torch.bfloat16)
