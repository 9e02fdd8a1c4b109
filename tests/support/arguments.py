"""Valid arguments of every op, of the extension's operators and of Triton's, by name: small float32 tensors."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from hypermask_fast.ops import OPS
from hypermask_fast.ops.task_rows import TaskRows
from support.comparing import DEVICE, randn

OFFSETS = [0, 12, 17, 18]
ADAM = 0.9, 0.99, 1e-8, 0.0, False, False  # betas, eps, weight decay, decoupled, maximize


def native_arguments(grad: bool = False) -> dict[str, tuple]:
    """Those of every operator of csrc/, on the CPU; grad: what takes a gradient asks for one."""
    weights = [torch.randn(3, 4).requires_grad_(grad), torch.randn(5).requires_grad_(grad)]
    logits, thresholds = torch.randn(18).requires_grad_(grad), torch.tensor([0.2, 0.4, 0.0])
    previous, norms = torch.randn(18), torch.rand(2)
    weight, bias = torch.randn(50, 6).requires_grad_(grad), torch.randn(50).requires_grad_(grad)
    hidden, targets = torch.randn(3, 1, 6).requires_grad_(grad), torch.randn(3, 50)
    state = [torch.rand(50, 6), torch.rand(50), torch.rand(50, 6), torch.rand(50, 6), torch.rand(50), torch.rand(50)]
    one = torch.tensor(1.0)
    plain = [w.detach() for w in weights]
    known = {
        "mask_thresholds": (logits.detach(), OFFSETS, torch.tensor([1, 2, 0])),
        "semi_binary_mask": (logits, torch.tensor(0.3)),
        "semi_binary_mask_backward": (torch.randn(18), logits.detach(), torch.tensor(0.3)),
        "masked_weights": (weights, logits, thresholds, OFFSETS),
        "masked_weights_backward": (plain, plain, logits.detach(), thresholds, OFFSETS),
        "weight_drift": (weights, previous, OFFSETS, 1, logits, thresholds),
        "weight_drift_backward": (norms, norms, plain, previous, OFFSETS, 2, logits.detach(), thresholds),
        "masked_weights_drift": (weights, logits, thresholds, OFFSETS, previous, 1),
        "masked_weights_drift_backward": (
            *(plain, norms, norms, plain, logits.detach(), thresholds),
            *(OFFSETS, previous, 2),
        ),
        "output_drift": (hidden, weight, bias, targets),
        "output_drift_backward": (one, hidden.detach(), weight.detach(), bias.detach(), targets),
        "hypernet_logits": (hidden.detach()[0, 0], weight, bias),
        "hypernet_adam": (torch.randn(3, 6), torch.randn(50), targets[:2], one, *state, one, one, *ADAM),
        "factored_adam": (
            *(torch.randn(3, 50), torch.rand(3), torch.randn(3, 6)),
            *(state[0], state[2], state[3], one, one, *ADAM),
        ),
    }
    # An operator that takes just what its op takes needs no line above.
    others = [name for name, op in OPS.items() if "cpu" in op.offers and op.layer is None and name not in known]
    return known | {name: tuple(valid(name).values()) for name in others}


def valid(op: str, device: str | torch.device = "cpu") -> dict[str, object]:
    """Those of a public op, by name and in order."""
    weights, previous, logits = [torch.randn(3, 4), torch.randn(5)], torch.randn(18), torch.randn(18)
    thresholds, one = torch.tensor([0.2, 0.4, 0.0]), torch.tensor(1.0)
    segments = {"weights": weights, "logits": logits, "thresholds": thresholds, "offsets": OFFSETS}
    chunks = {"hidden": torch.randn(10, 6), "output_weight": torch.randn(12, 6), "output_bias": torch.randn(12)}
    linear = {"x": torch.randn(3, 5), "weight": torch.randn(4, 5)}
    convolution = {"x": torch.randn(2, 4, 5, 5), "weight": torch.randn(6, 4, 3, 3)}
    dense = {"hidden": torch.randn(3, 1, 6), "weight": torch.randn(50, 6), "bias": torch.randn(50)}
    chunked = {"hidden": torch.randn(3, 2, 6), "weight": torch.randn(50, 6), "bias": torch.randn(50)}
    moments = {f"{name}_{m}": torch.rand_like(dense[name]) for name in ("weight", "bias") for m in "mv"}
    arguments = {
        "mask_thresholds": {"logits": logits, "offsets": OFFSETS, "ranks": torch.tensor([1, 2, 0])},
        "semi_binary_mask": {"logits": logits, "threshold": torch.tensor(0.3)},
        "masked_weights": segments,
        "weight_drift": {
            "weights": weights, "previous": previous, "offsets": OFFSETS, "norm": 1, "logits": logits,
            "thresholds": thresholds,
        },
        "masked_weights_drift": {**segments, "previous": previous, "norm": 1},
        "hypernet_logits": {**dense, "hidden": torch.randn(1, 1, 6), "size": 50},
        "output_drift": {**dense, "targets": torch.randn(3, 50)},
        "chunked_output_drift": {
            **chunked, **{f"old_{name}": torch.randn_like(t) for name, t in chunked.items()}, "size": 90,
        },
        "hypernet_adam": {
            "hidden": torch.randn(3, 6), "grad_logits": torch.randn(50), "targets": torch.randn(2, 50),
            "drift_weight": one, "weight": dense["weight"], "bias": dense["bias"], **moments, "step": one, "lr": one,
        },
        "output_residuals": {**dense, "hidden": torch.randn(3, 6), "targets": torch.randn(2, 50)},
        "hidden_gradient": {"factors": torch.randn(3, 50), "scales": torch.rand(3), "weight": dense["weight"]},
        "factored_adam": {
            "factors": torch.randn(3, 50), "scales": torch.rand(3), "hidden": torch.randn(3, 6),
            "weight": dense["weight"], "weight_m": moments["weight_m"], "weight_v": moments["weight_v"],
            "step": one, "lr": one,
        },
        "entropy_select": {"logits": torch.randn(3, 4, 5)},
        "masked_linear": {
            **linear, "logits": torch.randn(4, 5), "threshold": torch.tensor(0.3), "bias": torch.randn(4),
        },
        "masked_conv2d": {
            **convolution, "logits": torch.randn(6, 4, 3, 3), "threshold": torch.tensor(0.3), "bias": torch.randn(6),
        },
        "chunk_masked_linear": {
            **linear, **chunks, "start": 3, "threshold": torch.tensor(0.3), "bias": torch.randn(4),
        },
        "chunk_masked_conv2d": {
            "x": torch.randn(2, 2, 5, 5), "weight": torch.randn(4, 2, 3, 3), **chunks, "start": 3,
            "threshold": torch.tensor(0.3), "bias": torch.randn(4),
        },
        "task_batched_linear": {
            **linear, "logits": torch.randn(2, 4, 5), "thresholds": torch.tensor([0.3, 0.4]),
            "task_ids": torch.tensor([1, 0, 1]), "bias": torch.randn(4),
        },
    }  # fmt: skip
    if op not in arguments:
        arguments[op] = _of_its_benchmark(op)
    return {name: on_device(value, device) for name, value in arguments[op].items()}


def _of_its_benchmark(op: str) -> dict[str, object]:
    """Those of the op's smallest benchmark: for an op whose tests need no arguments of a certain size."""
    from bench.micro.shapes import cases

    case = cases("tiny")[op]
    values = case.inputs("forward", torch.device("cpu"), torch.float32)
    return dict(zip(inspect.signature(case.definition).parameters, values, strict=True))


def on_device(value: object, device: str | torch.device) -> object:
    """Tensors, and lists of them, on another device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [t.to(device) for t in value]
    return value


def leaf(*shape: int) -> Tensor:
    return randn(*shape).requires_grad_()


def threshold() -> Tensor:
    return torch.tensor(0.4, device=DEVICE)


# Those of Triton's operators, on the device where they run.
TRITON_ARGUMENTS: dict[str, Callable[[], tuple]] = {
    "masked_linear": lambda: (leaf(3, 5), leaf(4, 5), leaf(4, 5), threshold(), leaf(4)),
    "masked_linear_backward": lambda: (
        randn(3, 4), randn(3, 5), randn(4, 5), randn(4, 5), threshold(), [True, False, True],
    ),
    "masked_conv2d": lambda: (
        leaf(2, 4, 5, 5), leaf(6, 2, 3, 3), leaf(6, 2, 3, 3), threshold(), leaf(6), (2, 1), (1, 1), (1, 1), 2,
    ),
    "masked_conv2d_backward": lambda: (
        randn(2, 6, 3, 5), randn(2, 4, 5, 5), randn(6, 2, 3, 3), randn(6, 2, 3, 3), threshold(),
        (2, 1), (1, 1), (1, 1), 2, [True, True, False],
    ),
    "chunk_masked_linear": lambda: (
        leaf(3, 5), leaf(4, 5), leaf(4, 3), leaf(6, 3), leaf(6), 2, threshold(), leaf(4),
    ),
    "chunk_masked_linear_backward": lambda: (
        randn(3, 4), randn(3, 5), randn(4, 5), randn(4, 3), randn(6, 3), randn(6), 2, threshold(),
        [True, False, True, False, True],
    ),
    "chunk_masked_conv2d": lambda: (
        leaf(2, 2, 5, 5), leaf(2, 1, 3, 3), leaf(4, 3), leaf(6, 3), leaf(6), 2, threshold(), leaf(2),
        (1, 1), (1, 1), (1, 1), 2,
    ),
    "chunk_masked_conv2d_backward": lambda: (
        randn(2, 2, 5, 5), randn(2, 2, 5, 5), randn(2, 1, 3, 3), randn(4, 3), randn(6, 3), randn(6), 2, threshold(),
        (1, 1), (1, 1), (1, 1), 2, [True] * 5,
    ),
    "task_batched_linear": lambda: (
        leaf(3, 5), leaf(4, 5), leaf(2, 4, 5), threshold().expand(2),
        *TaskRows.of(torch.tensor([1, 0, 1], device=DEVICE), 2), leaf(2, 4),
    ),
    "task_batched_linear_backward": lambda: (
        randn(2, 3, 4), randn(3, 5), randn(4, 5), randn(2, 4, 5), threshold().expand(2), None, None, [True] * 3,
    ),
    "semi_binary_mask": lambda: (leaf(3, 5), threshold()),
    "semi_binary_mask_with_slope": lambda: (randn(3, 5), threshold()),
    "semi_binary_mask_backward": lambda: (randn(3, 5), randn(3, 5), threshold()),
    "entropy_select": lambda: (randn(3, 4, 5),),
    "masked_weights": lambda: ([leaf(2, 3), leaf(4)], leaf(11), threshold().expand(3), [0, 6, 10, 11]),
    "masked_weights_backward": lambda: (
        [randn(2, 3), randn(4)], [randn(2, 3), randn(4)], randn(11), threshold().expand(3), [0, 6, 10, 11], [True] * 2,
    ),
    "weight_drift": lambda: (
        [leaf(2, 3), leaf(4)], randn(11), [0, 6, 10], 2, leaf(11), threshold().expand(2),
    ),
    "weight_drift_backward": lambda: (
        randn(), randn(2).abs(), [randn(2, 3), randn(4)], randn(11), [0, 6, 10], 1, randn(11), threshold().expand(2),
    ),
}  # fmt: skip


NATIVE_OPERATORS = sorted(native_arguments())
