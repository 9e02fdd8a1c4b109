"""In plain PyTorch, too, arguments that do not fit are refused before anything is computed or changed."""

import pytest
import torch

from hypermask_fast import InputError, ops

L, R = torch.randn(2, 100), torch.tensor([10, 20])
W, THR = [torch.randn(8, 5), torch.randn(60)], torch.rand(2)
HIDDEN, LAYER, BIAS, TARGETS = torch.randn(3, 2, 4), torch.randn(50, 4), torch.randn(50), torch.randn(3, 100)
X, A, MANY = torch.randn(4, 5), torch.randn(8, 5), torch.randn(3, 8, 5)
IDS = torch.tensor([0, 1, 2, 0])
ONE = torch.tensor(1.0)


def adam_arguments() -> dict[str, torch.Tensor]:
    state = {f"{name}_{m}": torch.zeros_like(like) for name, like in (("weight", LAYER), ("bias", BIAS)) for m in "mv"}
    inputs = {"hidden": torch.randn(3, 4), "grad_logits": torch.randn(50), "targets": torch.randn(2, 50)}
    return {
        **inputs,
        "drift_weight": ONE,
        "weight": LAYER.clone(),
        "bias": BIAS.clone(),
        **state,
        "step": ONE,
        "lr": ONE,
    }


@pytest.mark.parametrize(
    ("op", "args", "message"),
    [
        ("mask_thresholds", (L, [0, 40, 101], R), "ascend from 0 or more to at most 100"),
        ("mask_thresholds", (L, [0, 60, 40], R), "ascend"),
        ("mask_thresholds", (L, [-1, 40, 100], R), "ascend"),
        ("mask_thresholds", (L, [], R), "ascend"),
        ("mask_thresholds", (L, [0, 40, 100], R[:1]), r"ranks must have shape \(2,\), not \(1,\)"),
        ("mask_thresholds", (L, [0, 40, 100], R.int()), "ranks int64"),
        ("mask_thresholds", (L, [0, 40, 100], R - 11), "rank -1 is outside segment 0 of 40 entries"),
        ("mask_thresholds", (L, [0, 40, 100], R * 3), "rank 60 is outside segment 1 of 60 entries"),
        ("masked_weights", (W, L[0], torch.rand(3), [0, 40, 100]), "one per segment"),
        ("masked_weights", (W, L[0], THR, [0, 40, 99]), "weights 1 has 60 entries, its segment 59"),
        ("masked_weights", (W, L[0], THR[:1], [0, 40]), "2 weights need 3 offsets, not 2"),
        ("masked_weights", (W, L, THR, [0, 40, 100]), "must be flat"),
        ("weight_drift", (W, L[0], [0, 40, 100], 3), "norm must be 1 or 2, not 3"),
        ("weight_drift", (W, L[0], [0, 40, 100], 1, L[1]), "go together"),
        ("weight_drift", (W, L[0], [0, 40, 100], 1, L[1, :50], THR), "at most 50"),
        ("hypernet_logits", (HIDDEN, LAYER, BIAS, -1), "size must be 0 to .* = 100, not -1"),
        ("hypernet_logits", (HIDDEN, LAYER, BIAS, 101), "size must be 0 to .* = 100, not 101"),
        ("hypernet_logits", (HIDDEN[:, 0], LAYER, BIAS, 50), "hidden must be"),
        ("hypernet_logits", (HIDDEN, LAYER, BIAS[:49], 50), "bias must have shape"),
        ("output_drift", (HIDDEN, LAYER, BIAS, TARGETS[:1]), "targets must have shape"),
        ("output_drift", (HIDDEN, LAYER, BIAS, torch.randn(3, 101)), "not 101"),
        ("chunked_output_drift", (HIDDEN, LAYER, BIAS, HIDDEN[:2], LAYER, BIAS, 100), "old_hidden must have shape"),
        ("chunked_output_drift", (HIDDEN, LAYER, BIAS, HIDDEN, LAYER, BIAS, -1), "not -1"),
        ("masked_linear", (X, A, A, torch.rand(5)), "threshold must have one entry, not 5"),
        ("masked_linear", (X, A, A[:1], ONE), "logits must have shape"),
        ("task_batched_linear", (X, A, MANY, torch.rand(3), IDS[:1]), r"task_ids must have shape \(4,\)"),
        ("task_batched_linear", (X, A, MANY, torch.rand(3), IDS.int()), "task_ids must be int64"),
        ("task_batched_linear", (X, A, MANY, torch.rand(2), IDS), "thresholds must have shape"),
        ("entropy_select", (X,), "T, batch, classes"),
        ("entropy_select", (MANY[:0],), "T of 1 or more"),
    ],
)
def test_what_does_not_fit_is_refused(op, args, message):
    with pytest.raises(InputError, match=message):
        getattr(ops, op)(*args, backend="reference")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", torch.randn(3, 5)),
        ("hidden", torch.randn(0, 4)),
        ("targets", torch.randn(2, 49)),
        ("bias_m", torch.zeros(1)),
        ("bias_v", torch.zeros(50, dtype=torch.float64)),
        ("lr", torch.ones(2)),
    ],
)
def test_a_refused_step_changes_nothing(name, value):
    arguments = {**adam_arguments(), name: value}
    before = {key: tensor.clone() for key, tensor in arguments.items()}
    with pytest.raises(InputError):
        ops.hypernet_adam(**arguments, backend="reference")
    assert all(torch.equal(tensor, before[key]) for key, tensor in arguments.items())
    ops.hypernet_adam(**adam_arguments(), backend="reference")


@pytest.mark.parametrize("backend", ["reference", None])
def test_tensors_on_two_devices_are_refused(backend):
    """With one on "meta" PyTorch would call a shape function and hand out a result that nobody has computed."""
    with pytest.raises(InputError, match="output_drift: all tensors must be on one device, not on cpu and meta"):
        ops.output_drift(HIDDEN[:, :1], LAYER, BIAS, TARGETS[:, :50].to("meta"), backend=backend)
    with pytest.raises(InputError, match="not on cpu and meta"):
        ops.masked_weights([W[0].to("meta"), W[1]], L[0], THR, [0, 40, 100], backend=backend)
