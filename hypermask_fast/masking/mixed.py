"""A batch whose samples belong to several tasks, for any inputs and outputs that a network has."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map  # noqa: PLC2701

from ..errors import InputError
from .norms import BatchNorm
from .scope import tensors_of

_BY_ROWS = (
    *(nn.Sequential, nn.Identity, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Dropout),
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)
_TRIED = 6  # rows at most, when it is tried whether rows are samples
_AGREE = {torch.float64: 1e-8, torch.float32: 1e-3}  # of the largest entry, in place of 0.05 in half precision


def samples(inputs: tuple, kwargs: dict[str, Any]) -> int:
    """The number of samples: the first dimension of the first tensor among the inputs."""
    for leaf in tree_leaves((inputs, kwargs)):
        if isinstance(leaf, Tensor) and leaf.is_nested:
            raise InputError("a nested tensor can't be cut into the samples of each task: it needs one task per batch")
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return leaf.shape[0]
    raise InputError("one task per sample needs a tensor (batch, ...) among the network's inputs")


def is_one_sample(inputs: tuple, kwargs: dict[str, Any]) -> bool:
    first = inputs[0] if inputs else next(iter(kwargs.values()), None)
    return isinstance(first, Tensor) and first.dim() > 0 and first.shape[0] == 1


def rows(everything: tuple, chosen: Tensor, count: int) -> tuple:
    """The inputs with the chosen rows (int64) of every tensor that has `count` of them, other values as they are."""

    def pick(leaf: Any) -> Any:
        return leaf[chosen] if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == count else leaf

    return tree_map(pick, everything)


# -- whether rows are samples -----------------------------------------------------------------------------------------


def kind(inputs: tuple, kwargs: dict[str, Any], count: int) -> Hashable:
    """What decides how a network takes its inputs: their structure, dimensions, dtypes, and which have `count` rows."""
    leaves, structure = tree_flatten((inputs, kwargs))
    of_leaves = [(t.dim(), t.dtype, t.shape[:1] == (count,)) if isinstance(t, Tensor) else None for t in leaves]
    return str(structure), tuple(of_leaves)


def independent(net: nn.Module, inputs: tuple, kwargs: dict[str, Any], count: int) -> bool:
    """Whether the network gives the same for some rows of a batch alone as for the same rows within it.

    Not so where the first dimension is the sequence, or where samples see each other. The network runs in evaluation
    mode, on a few rows, then on every other one of them, and leaves nothing behind. That is spared where the layers
    tell, for it waits for the device. Batch norm without running statistics is left out: there samples are meant to
    meet, those of one task. A network that draws random numbers in evaluation mode can't be judged and is taken at its
    word.
    """
    if all(_is_by_rows(module) for module in net.modules()):
        return True
    device = next((t.device for t in tree_leaves((inputs, kwargs)) if isinstance(t, Tensor)), None)
    chosen = torch.arange(min(count, _TRIED), device=device)
    without = [m for m in net.modules() if isinstance(m, BatchNorm) and m.running_mean is None]
    hooks = [module.register_forward_hook(lambda module, args, y: args[0]) for module in without]
    modes = {module: module.training for module in net.modules()}

    def run(rows_of: Tensor) -> list[Tensor]:
        args, named = rows((inputs, kwargs), rows_of, count)
        held = dict((*net.named_parameters(), *net.named_buffers()))  # the network may change any in place
        copied = {name: tensor.detach().clone() for name, tensor in held.items()}
        return tensors_of(functional_call(net, copied, args, named))

    try:
        net.eval()
        devices = [device] if device is not None and device.type == "cuda" else []
        # A compiled network is not compiled for these sizes too.
        with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices), torch.no_grad():
            try:
                whole, again = run(chosen), run(chosen)
            except Exception:  # it takes no other batch: its own pass says what is wrong
                return True
            if not all(map(_agree, whole, again)) or any(t.dim() == 0 or len(t) != len(chosen) for t in whole):
                return True
            try:
                return all(
                    _agree(alone, together[start::2])
                    for start in (0, 1)
                    for alone, together in zip(run(chosen[start::2]), whole, strict=True)
                )
            except Exception:  # it takes all rows, and not a part of them
                return False
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode


def _is_by_rows(module: nn.Module) -> bool:
    """Whether a layer of PyTorch's own, or the masked one in its place, surely keeps rows apart."""
    kind = vars(module).get("mask_plain", type(module))
    flat = isinstance(module, nn.Flatten) and kind is nn.Flatten and module.start_dim > 0
    return (flat or kind in _BY_ROWS) and "forward" not in vars(module)


def _agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same but for rounding; integers may be what rounding decides."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point() or not a.numel():
        return True
    largest = float(b.nan_to_num(0.0, 0.0, 0.0).abs().max())
    within = _AGREE.get(a.dtype, 0.05) * largest
    return torch.allclose(a, b, rtol=0.0, atol=within, equal_nan=True)


# -- outputs ----------------------------------------------------------------------------------------------------------


def joined(parts: Sequence[Any], counts: Sequence[int], order: Tensor) -> Any:
    """The parts' outputs one after another, their rows then taken by `order`.

    Raises:
        InputError: a tensor without a row per sample among the outputs.
    """
    for part, count in zip(parts, counts, strict=True):
        for tensor in tensors_of(part):
            if tensor.dim() == 0 or tensor.shape[0] != count:
                raise InputError(
                    f"the network gives a tensor of {tuple(tensor.shape)} for {count} samples: without a row per "
                    "sample it needs one task per batch"
                )
    return _over([*parts], lambda tensors: torch.cat(tensors)[order])


def stacked(outputs: Sequence[Any]) -> Any:
    """Outputs of one structure with their tensors stacked, (tasks, ...)."""
    return _over([*outputs], torch.stack)


def spread(outputs: Any, places: Sequence[int], count: int) -> Any:
    """Stacked outputs at these places among `count`; between them NaN, or -1 of integers."""

    def put(tensors: list[Tensor]) -> Tensor:
        (rows,) = tensors
        empty = float("nan") if rows.is_floating_point() or rows.is_complex() else -1
        filled = rows.new_full((count, *rows.shape[1:]), empty)
        return filled.index_copy(0, torch.tensor(list(places), device=rows.device), rows)

    return _over([outputs], put)


def of_task(outputs: Any, task: int) -> Any:
    """Of `stacked` outputs, those of one task."""
    return _over([outputs], lambda tensors: tensors[0][task])


def logits(output: Any, select: Callable[[Any], Tensor] | None) -> Tensor:
    """The logits in a network's output. Raises InputError where they are not to be found."""
    found = output if select is None else select(output)
    if isinstance(found, Tensor):
        return found
    found = found.get("logits") if isinstance(found, dict) else getattr(found, "logits", None)
    if select is None and isinstance(found, Tensor):
        return found
    raise InputError(
        f"the network returns {type(output).__name__}: say where its logits are, such as select=lambda y: y[0]"
    )


def _over(outputs: list, function: Callable[[list[Tensor]], Tensor]) -> Any:
    """`function` of the tensors at the same place of all outputs."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return function(outputs)
    if isinstance(first, dict):
        values = {key: _over([output[key] for output in outputs], function) for key in first}
        return type(first)(**values) if is_dataclass(first) else type(first)(values)
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_over(list(values), function) for values in zip(*outputs, strict=True)))
    if isinstance(first, (tuple, list)):
        return type(first)(_over(list(values), function) for values in zip(*outputs, strict=True))
    if is_dataclass(first) and not isinstance(first, type):
        return type(first)(**{key: _over([getattr(o, key) for o in outputs], function) for key in vars(first)})
    if hasattr(first, "to_tuple") or not tensors_of(first):
        return first
    raise InputError(f"the network returns {type(first).__name__}: tensors, tuples, lists, dicts and dataclasses pass")
