"""Arguments that do not fit are refused before anything is computed or changed, by every backend in the same words."""

import inspect

import pytest
import torch
from support.arguments import valid
from support.comparing import DEVICE

from hypermask_fast import InputError, ops
from hypermask_fast.ops import arguments as rules
from hypermask_fast.ops import registry

F = torch.ones
RANKS = torch.tensor([1, 2, 0])
IDS = torch.tensor([1, 0, 1])

# op, what is changed of `valid(op)`, what the message says. There logits and previous weights have 18 entries, weights
# 12 and 5, offsets are [0, 12, 17, 18]; the dense layer is (50, 6), of 3 tasks.
REFUSED = [
    ("mask_thresholds", {"offsets": [0, 12, 17, 19]}, "ascend from 0 or more to at most 18 entries"),
    ("mask_thresholds", {"offsets": [0, 17, 12, 18]}, "offsets must ascend"),
    ("mask_thresholds", {"offsets": [-1, 12, 17, 18]}, "offsets must ascend"),
    ("mask_thresholds", {"offsets": []}, "offsets must ascend"),
    ("mask_thresholds", {"ranks": RANKS[:1]}, r"ranks must have shape \(3,\), not \(1,\)"),
    ("mask_thresholds", {"ranks": RANKS.int()}, "ranks int64"),
    ("mask_thresholds", {"ranks": RANKS - 2}, "rank -1 is outside segment 0 of 12 entries"),
    ("mask_thresholds", {"ranks": RANKS * 3}, "rank 6 is outside segment 1 of 5 entries"),
    ("mask_thresholds", {"logits": F(())}, r"logits must be \(\.\.\., N\)"),
    ("semi_binary_mask", {"logits": F(3, 4), "threshold": F(3)}, r"\(3,\) does not broadcast to logits of \(3, 4\)"),
    ("semi_binary_mask", {"logits": F(4), "threshold": F(3, 4)}, "does not broadcast"),
    ("masked_weights", {"thresholds": F(4)}, r"thresholds must be one per segment, \(3,\), not \(4,\)"),
    ("masked_weights", {"thresholds": F(1)}, "one per segment"),
    ("masked_weights", {"offsets": [0, 12, 16, 18]}, "weights 1 has 5 entries, its segment 4"),
    ("masked_weights", {"offsets": [0, 11, 16, 18]}, "weights 0 has 12 entries, its segment 11"),
    ("masked_weights", {"offsets": [0, 12], "thresholds": F(1)}, "2 weights need 3 offsets, not 2"),
    ("masked_weights", {"offsets": [-12, 0, 5, 6]}, "offsets must ascend from 0 or more"),
    ("masked_weights", {"logits": F(2, 18)}, "must be flat"),
    ("masked_weights", {"logits": F(17)}, "at most 17 entries"),
    ("weight_drift", {"norm": 3}, "norm must be 1 or 2, not 3"),
    ("weight_drift", {"thresholds": None}, "logits and thresholds go together, one is missing"),
    ("weight_drift", {"logits": None}, "go together"),
    ("weight_drift", {"logits": F(10)}, "at most 10 entries"),
    ("weight_drift", {"logits": F(2, 9)}, "must be flat"),
    ("weight_drift", {"previous": F(17)}, "at most 17 entries"),
    ("weight_drift", {"previous": F(2, 9)}, "must be flat"),
    ("weight_drift", {"offsets": [0, 12]}, "2 weights need 3 offsets, not 2"),
    ("weight_drift", {"offsets": [0, 11, 16, 18]}, "weights 0 has 12 entries, its segment 11"),
    ("masked_weights_drift", {"norm": 0}, "norm must be 1 or 2, not 0"),
    ("masked_weights_drift", {"previous": F(17)}, "at most 17 entries"),
    ("masked_weights_drift", {"thresholds": F(2)}, "one per segment"),
    ("hypernet_logits", {"size": -1}, r"size must be 0 to chunks \* chunk_size = 50, not -1"),
    ("hypernet_logits", {"size": 51}, "= 50, not 51"),
    ("hypernet_logits", {"hidden": F(1, 6)}, "hidden must be"),
    ("hypernet_logits", {"hidden": F(1, 1, 5)}, "hidden must have shape"),
    ("hypernet_logits", {"bias": F(49)}, "bias must have shape"),
    ("output_drift", {"targets": F(1, 50)}, r"targets must have shape \(3, 50\), not \(1, 50\)"),
    ("output_drift", {"targets": F(3, 51)}, "not 51"),
    ("output_drift", {"targets": F(150)}, r"targets must be \(T, N\)"),
    ("chunked_output_drift", {"old_hidden": F(2, 2, 6)}, "old_hidden must have shape"),
    ("chunked_output_drift", {"old_bias": F(49)}, "old_bias must have shape"),
    ("chunked_output_drift", {"size": -1}, "not -1"),
    ("hypernet_adam", {"hidden": F(3, 5)}, "hidden must have shape"),
    ("hypernet_adam", {"hidden": F(0, 6)}, r"hidden must be \(t \+ 1, H\)"),
    ("hypernet_adam", {"targets": F(2, 49)}, "targets must have shape"),
    ("hypernet_adam", {"bias_m": F(1)}, "bias_m must have shape"),
    ("hypernet_adam", {"bias_v": F(50).double()}, "bias and bias_v must be torch.float32"),
    ("hypernet_adam", {"lr": F(2)}, "lr must have one entry, not 2"),
    ("entropy_select", {"logits": F(4, 5)}, "T, batch, classes"),
    ("entropy_select", {"logits": F(0, 4, 5)}, "T of 1 or more"),
    ("entropy_select", {"logits": F(2, 3, 0)}, "logits must be"),
    ("masked_linear", {"threshold": F(5)}, "threshold must have one entry, not 5"),
    ("masked_linear", {"logits": F(1, 5)}, "logits must have shape"),
    ("masked_linear", {"logits": F(5, 4)}, r"logits must have shape \(4, 5\), not \(5, 4\)"),
    ("masked_linear", {"x": F(3, 4)}, "x must be"),
    ("masked_linear", {"x": F(())}, r"x must be \(\.\.\., 5\) for a weight of \(4, 5\), not \(\)"),
    ("masked_linear", {"bias": F(5)}, "bias must have shape"),
    ("masked_linear", {"weight": F(5)}, "weight must be"),
    ("masked_conv2d", {"x": F(1, 3, 5, 5)}, "x must have 4 channels"),
    ("masked_conv2d", {"x": F(4, 5, 5)}, "x must be"),
    ("masked_conv2d", {"x": F(1, 4, 2, 2)}, "does not fit"),
    ("masked_conv2d", {"logits": F(6, 4, 3, 1)}, "logits must have shape"),
    ("masked_conv2d", {"weight": F(6, 4)}, r"weight must be \(out, in / groups, kh, kw\)"),
    ("masked_conv2d", {"threshold": F(6)}, "threshold must have one entry, not 6"),
    ("masked_conv2d", {"bias": F(4)}, "bias must have shape"),
    ("masked_conv2d", {"groups": 5}, "groups must divide"),
    ("masked_conv2d", {"groups": 0}, "groups must divide"),
    ("masked_conv2d", {"stride": 0}, "stride must be a number of at least 1"),
    ("masked_conv2d", {"dilation": (1, 0)}, "dilation must be a number of at least 1"),
    ("masked_conv2d", {"padding": (1, -1)}, "padding must be a number of at least 0"),
    ("masked_conv2d", {"padding": "same"}, "padding must be a number of at least 0, or two, not 'same'"),
    *[
        (op, change, message)
        for op in ("chunk_masked_linear", "chunk_masked_conv2d")
        for change, message in (
            ({"start": 110}, "lie outside"),
            ({"start": -1}, "lie outside"),
            ({"hidden": F(10, 5)}, "hidden must be"),
            ({"output_bias": F(11)}, "output_bias must have shape"),
            ({"threshold": F(3)}, "threshold must have one entry"),
            ({"bias": F(5)}, "bias must have shape"),
            ({"weight": F(5)}, "weight must be"),
        )
    ],
    ("chunk_masked_conv2d", {"weight": F(0, 2, 3, 3)}, "out, kh and kw at least 1"),
    ("chunk_masked_conv2d", {"x": F(2, 3, 5, 5)}, "x must have 2 channels for this weight, not 3"),
    ("chunk_masked_conv2d", {"padding": "same"}, "padding must be a number of at least 0, or two, not 'same'"),
    ("chunk_masked_linear", {"x": F(3, 4)}, "x must be"),
    ("task_batched_linear", {"x": F(3, 4)}, "x must be"),
    ("task_batched_linear", {"x": F(2, 3, 5)}, "x must be"),
    ("task_batched_linear", {"x": F(3, 3, 5), "task_ids": None}, "x must be"),
    ("task_batched_linear", {"weight": F(5)}, "weight must be"),
    ("task_batched_linear", {"logits": F(2, 5, 4)}, "logits must have shape"),
    ("task_batched_linear", {"logits": F(4, 5)}, "logits must be"),
    ("task_batched_linear", {"logits": F(())}, "logits must be"),
    ("task_batched_linear", {"thresholds": F(3)}, "thresholds must have shape"),
    ("task_batched_linear", {"task_ids": IDS.int()}, "task_ids must be int64"),
    ("task_batched_linear", {"task_ids": IDS[:1]}, r"task_ids must have shape \(3,\)"),
    ("task_batched_linear", {"task_ids": IDS.repeat(2)}, r"task_ids must have shape \(3,\), not \(6,\)"),
    ("task_batched_linear", {"bias": F(3, 4)}, "bias must be"),
]


def refusal(call, given) -> str:
    with pytest.raises(InputError) as caught:
        call(**given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


INTEGERS = ("entropy_select", {"logits": F(2, 3, 4).long()}, "logits must be float")


@pytest.mark.parametrize(("op", "change", "message"), [*REFUSED, INTEGERS])
def test_every_backend_refuses_in_the_same_words(op, change, message):
    """Those that offer the op, there or not, the reference, and the choice where nobody names one."""
    given = valid(op) | change
    asked = [None, "reference", *ops.OPS[op].offers]
    said = {refusal(getattr(ops, op), given | {"backend": backend}) for backend in asked}
    assert len(said) == 1
    with pytest.raises(InputError, match=message):
        getattr(ops, op)(**given)


@pytest.mark.parametrize(("op", "change", "message"), [case for case in REFUSED if "triton" in ops.OPS[case[0]].offers])
def test_a_triton_kernel_called_directly_refuses_in_the_same_words(triton, op, change, message):
    names = inspect.signature(ops.OPS[op].definition).parameters
    given = {name: value for name, value in (valid(op, DEVICE) | on_the_device(change)).items() if name in names}
    assert refusal(getattr(triton, op), given) == refusal(getattr(ops, op), given)


def on_the_device(change):
    return {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in change.items()}


@pytest.mark.parametrize(
    ("op", "name", "value", "message"),
    [
        ("semi_binary_mask", "logits", torch.randn(18).double(), "float64"),
        ("masked_weights", "thresholds", F(3).double(), "float64"),
        ("masked_weights", "weights", [F(12), F(5).half()], "the weights differ in dtype"),
        ("weight_drift", "weights", [F(12), F(5).half()], "the weights differ in dtype"),
        ("masked_linear", "x", F(3, 5).double(), "float64"),
        ("masked_linear", "weight", F(4, 5).int(), "int32"),
        ("masked_conv2d", "x", F(2, 4, 5, 5).bool(), "bool"),
        ("chunk_masked_linear", "hidden", F(10, 6).long(), "int64"),
        ("chunk_masked_conv2d", "hidden", F(10, 6).long(), "int64"),
        ("task_batched_linear", "weight", F(4, 5).double(), "float64"),
        ("masked_linear", "logits", F(4, 5, device="meta"), "use one device"),
    ],
)
def test_a_triton_kernel_called_directly_refuses_other_dtypes(triton, op, name, value, message):
    given = valid(op, DEVICE)
    if not isinstance(value, list) and value.is_meta:
        given[name] = value
    else:
        given[name] = [v.to(DEVICE) for v in value] if isinstance(value, list) else value.to(DEVICE)
    assert message in refusal(getattr(triton, op), given)


@pytest.mark.parametrize("op", ops.OPS)
def test_valid_arguments_are_taken(op):
    """By the reference and by who offers the op; else a refusal above would prove nothing."""
    given = valid(op)
    assert list(given) == list(inspect.signature(ops.OPS[op].definition).parameters)[: len(given)]
    for backend in ("reference", *ops.OPS[op].offers):
        if not registry.problem(backend) and not ops.OPS[op].refusal(backend, *by_position(op, given)):
            getattr(ops, op)(**valid(op), backend=backend)


def by_position(op, given):
    parameters = inspect.signature(ops.OPS[op].definition).parameters.values()
    return [given.get(p.name, p.default) for p in parameters]


def test_every_op_has_a_rule_that_is_tested():
    assert {op for op, _, _ in REFUSED} == set(ops.OPS)
    assert {op.rule.__name__ for op in ops.OPS.values()} == set(ops.OPS)
    assert all(op.rule is getattr(rules, name) for name, op in ops.OPS.items())


@pytest.mark.parametrize("backend", ["reference", "cpu", None])
@pytest.mark.parametrize(("op", "change", "message"), [case for case in REFUSED if case[0] == "hypernet_adam"])
def test_a_refused_step_changes_nothing(backend, op, change, message):
    given = valid(op) | change
    before = {key: tensor.clone() for key, tensor in given.items()}
    with pytest.raises(InputError, match=message):
        ops.hypernet_adam(**given, backend=backend)
    assert all(torch.equal(tensor, before[key]) for key, tensor in given.items())


@pytest.mark.parametrize("backend", ["reference", "cpu", "cuda", None])
def test_tensors_on_two_devices_are_refused(backend):
    """With one on "meta" PyTorch would call a shape function and hand out a result that nobody has computed."""
    given = valid("output_drift")
    given["targets"] = given["targets"].to("meta")
    with pytest.raises(InputError, match="output_drift: all tensors must be on one device, not on cpu and meta"):
        ops.output_drift(**given, backend=backend)
    given = valid("masked_linear")
    given["logits"] = given["logits"].to("meta")
    with pytest.raises(InputError, match="masked_linear: all tensors must be on one device, not on cpu and meta"):
        ops.masked_linear(**given, backend=backend)
    given = valid("masked_weights")
    given["weights"][0] = given["weights"][0].to("meta")
    with pytest.raises(InputError, match="not on cpu and meta|not on meta and cpu"):
        ops.masked_weights(**given, backend=backend)
