"""The hypernetwork's dense output layer: its logits, its output drift, and its backward pass with Adam's step, in one
pass or in two."""

import torch
from torch import Tensor

from . import Served, constant, contiguous, operator

_STATIC_SHARED = 256  # bytes that the GPU's kernel over the dense layer has besides, at most


def _shared_memory_problem(hidden: Tensor, tasks: int, makes_weights: bool = False, steps_weights: bool = False) -> str:
    """Why the GPU's kernel over the dense layer can't hold its tiles, the hidden vectors and the factors."""
    if not hidden.is_cuda:
        return ""
    width = hidden.shape[-1]
    needed = dense_shared_bytes(tasks, width, makes_weights, steps_weights)
    if makes_weights and on_tensor_cores(tasks, width):
        needed = min(needed, dense_shared_bytes(tasks, width, makes_weights, steps_weights, tensor_cores=True))
    needed += _STATIC_SHARED
    there = torch.cuda.get_device_properties(hidden.device).shared_memory_per_block_optin
    return "" if needed <= there else f"{tasks} tasks of width {width} need {needed} bytes of shared memory"


def on_tensor_cores(tasks: int, width: int) -> bool:
    """Whether the GPU's kernel makes gradients by tensor cores, of tensors that begin on 16 bytes, where it fits."""
    return width % 4 == 0 and tasks >= 24


def dense_shared_bytes(
    tasks: int, width: int, makes_weights: bool, steps_weights: bool, tensor_cores: bool = False
) -> int:
    """What csrc/common/launch.h says: `dense_shared_floats` of `dense_layout` or `tensor_layout`, for tensors that
    begin on 16 bytes."""
    pack = 4 if width % 4 == 0 else 1
    tiles = 2 + 2 * steps_weights + (makes_weights and pack == 1)
    packs = width // pack
    stride = (packs | 1) * 4 if pack == 4 else packs
    if tensor_cores:
        rows = 32 * max(8 // -(-width // 16), 1)
        columns = -(-width // 8) * 8
        hidden, factors = -(-tasks // 8) * 8 * (columns + 8 * (columns % 16 == 0)), -(-tasks // 16) * 16 * (rows + 8)
    else:
        rows = 4 * min(max(256 // packs, 1), 64)
        chunk = 8 if tasks > (16 if pack == 4 else 4) else 4
        slots = -(-max(tasks, 1) // chunk) * chunk
        hidden, factors = slots * stride, slots * rows
    return 4 * (tiles * rows * stride + hidden + factors)


def _constants(*tensors):
    return [constant(tensor) for tensor in tensors]


# -- output_drift ------------------------------------------------------------------------------------------------------


def _output_drift_ready(hidden, weight, bias, targets):
    return hidden.contiguous(), weight.contiguous(), bias.contiguous(), constant(targets)


def output_drift_condition(hidden, weight, bias, targets):
    if hidden.shape[1] != 1:
        return "the layer is chunked; see chunked_output_drift"
    if targets.shape[1] != weight.shape[0]:
        return "the targets are not of the layer's whole output"
    return _shared_memory_problem(hidden, hidden.shape[0], makes_weights=True)


def _output_drift_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _output_drift_backward(ctx, grad):
    grads = _output_drift_backward_operator(grad.contiguous(), *ctx.saved_tensors)
    return *grads, None


_output_drift_operator = operator(
    "output_drift",
    lambda hidden, weight, bias, targets: weight.new_empty(()),
    _output_drift_backward,
    _output_drift_setup,
)
_output_drift_backward_operator = operator(
    "output_drift_backward",
    lambda grad, hidden, weight, bias, targets: tuple(torch.empty_like(t) for t in (hidden, weight, bias)),
)
output_drift = Served(_output_drift_operator, _output_drift_ready)


# -- hypernet_logits ---------------------------------------------------------------------------------------------------


# Tasks up to which the CPU's kernel beats a matrix product. Each task's logits are to the bit what they are alone.
_MOST_TASKS = 32


def _hidden_of_one_task(hidden, weight, bias, size):
    return hidden.reshape(-1).contiguous(), weight.contiguous(), bias.contiguous()


def _hidden_of_several_tasks(hidden, weight, bias, size):
    return hidden.flatten(1).contiguous(), weight.contiguous(), bias.contiguous()


def hypernet_logits_form(hidden, weight, bias, size):
    tasks, chunks = hidden.shape[:2]
    if chunks != 1 or size != weight.shape[0]:
        return "more than one chunk: a matrix product, torch's own"
    if tasks == 1 or (hidden.device.type == "cpu" and 1 < tasks <= _MOST_TASKS):
        return ""
    return f"{tasks} tasks: a matrix product, torch's own"


def hypernet_logits_condition(hidden, weight, bias, size):
    return _shared_memory_problem(hidden, 1)


def _hypernet_logits_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _hypernet_logits_backward(ctx, grad):
    hidden, weight = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.needs_input_grad
    if hidden.dim() == 2:
        return (
            grad @ weight if need_hidden else None,
            grad.t() @ hidden if need_weight else None,
            grad.sum(0) if need_bias else None,
        )
    return (
        weight.t() @ grad if need_hidden else None,
        torch.outer(grad, hidden) if need_weight else None,
        grad if need_bias else None,
    )


_hypernet_logits_operator = operator(
    "hypernet_logits",
    lambda hidden, weight, bias: weight.new_empty(*hidden.shape[:-1], weight.shape[0]),
    _hypernet_logits_backward,
    _hypernet_logits_setup,
    twice=True,
)


class _Logits:
    """The op by the operator, which takes one task's hidden vector (H,) or several tasks' (T, H). Reshaping has a
    cheaper gradient than to select the only task or chunk."""

    def __init__(self) -> None:
        self._of_one = Served(_hypernet_logits_operator, _hidden_of_one_task)
        self._of_several = Served(_hypernet_logits_operator, _hidden_of_several_tasks)

    def __call__(self, hidden, weight, bias, size):
        if hidden.shape[0] == 1:
            return self._of_one(hidden, weight, bias, size).unsqueeze(0)
        return self._of_several(hidden, weight, bias, size)

    def of_kind(self, hidden, weight, bias, size):
        if hidden.shape[0] > 1:
            return self._of_several.of_kind(hidden, weight, bias, size)
        of_one = self._of_one.of_kind(hidden, weight, bias, size)
        return lambda *values: of_one(*values).unsqueeze(0)


hypernet_logits = _Logits()


# -- hypernet_adam -----------------------------------------------------------------------------------------------------

_STEPPED = slice(4, 10)  # of its arguments: weight, bias and their moments, which it modifies


@torch.no_grad()
def hypernet_adam(*args):
    return _stepping(_hypernet_adam_operator, _STEPPED, args[:12], args[12:])


def _stepping(step, stepped, tensors, settings):
    """Calls an operator that modifies tensors[stepped] in place."""
    before, behind = contiguous(tensors[: stepped.start]), contiguous(tensors[stepped.stop :])
    everything = (*before, *tensors[stepped], *behind)
    result = step(*(t.detach() if t.requires_grad else t for t in everything), *settings)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors[stepped])
    return result


def hypernet_adam_condition(hidden, *rest):
    if not all(t.is_contiguous() for t in (hidden, *rest)[_STEPPED]):  # a copy would be stepped in its place
        return "weight, bias and their moments are not contiguous"
    return _shared_memory_problem(hidden, hidden.shape[0], makes_weights=True, steps_weights=True)


_hypernet_adam_operator = operator(
    "hypernet_adam", lambda hidden, *rest: (torch.empty_like(hidden), hidden.new_empty(()))
)


# -- the same in two passes: output_residuals forward, hidden_gradient backward, factored_adam in step() ---------------


def output_residuals_condition(hidden, weight, bias, targets):
    return _shared_memory_problem(hidden, hidden.shape[0])


_output_residuals_operator = operator(
    "output_residuals",
    lambda hidden, weight, bias, targets: (
        weight.new_empty(hidden.shape[0], weight.shape[0]),
        weight.new_empty(()),
    ),
)
output_residuals = Served(_output_residuals_operator, _constants)


def hidden_gradient_condition(factors, scales, weight):
    return _shared_memory_problem(weight, factors.shape[0])


_hidden_gradient_operator = operator(
    "hidden_gradient",
    lambda factors, scales, weight: (
        weight.new_empty(factors.shape[0], weight.shape[1]),
        weight.new_empty(weight.shape[0]),
    ),
)
hidden_gradient = Served(_hidden_gradient_operator, _constants)

_FACTORED = slice(3, 6)  # weight and its moments


@torch.no_grad()
def factored_adam(*args):
    return _stepping(_factored_adam_operator, _FACTORED, args[:8], args[8:])


def factored_adam_condition(factors, scales, hidden, *rest):
    if not all(t.is_contiguous() for t in rest[:3]):  # a copy would be stepped in its place
        return "weight and its moments are not contiguous"
    return _shared_memory_problem(hidden, hidden.shape[0], makes_weights=True, steps_weights=True)


_factored_adam_operator = operator("factored_adam", lambda *args: None)
