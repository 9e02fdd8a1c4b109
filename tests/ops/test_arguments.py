"""What holds for the arguments of every op; what an op refuses stands in its own test_<op>.py."""

import inspect

import pytest
import torch
from support.arguments import valid

from hypermask_fast import InputError, ops
from hypermask_fast.ops import arguments, registry

each_op = pytest.mark.parametrize("op", ops.OPS)


@each_op
def test_valid_arguments_are_taken(op):
    """By the reference and by who offers the op; else the refusals of what is changed in them would prove nothing."""
    entry, given = ops.OPS[op], valid(op)
    parameters = inspect.signature(entry.definition).parameters
    assert list(given) == list(parameters)[: len(given)]
    values = [given.get(name, parameter.default) for name, parameter in parameters.items()]
    for backend in ("reference", *entry.offers):
        if not entry.refusal(backend, *values):
            entry(**valid(op), backend=backend)


@each_op
def test_the_rule_has_the_name_of_its_op(op):
    assert ops.OPS[op].rule is getattr(arguments, op)


@each_op
def test_a_missing_tensor_and_too_many_arguments_are_refused(op):
    entry, given = ops.OPS[op], valid(op)
    for name in [name for name, value in given.items() if isinstance(value, torch.Tensor)]:
        if inspect.signature(entry.definition).parameters[name].default is inspect.Parameter.empty:
            with pytest.raises(InputError, match=f"{op}: {name} must be a tensor, not NoneType"):
                entry(**given | {name: None})
    with pytest.raises(TypeError, match="takes .* and backend"):
        entry(**given, colour=1)


@pytest.mark.parametrize("backend", [None, *registry.BACKENDS])
@pytest.mark.parametrize("op", [op for op in ops.OPS if op != "entropy_select"])
def test_tensors_on_two_devices_are_refused(op, backend):
    """With one on "meta" PyTorch would call a shape function and hand out a result that nobody has computed."""
    given = valid(op)
    name = [name for name, value in given.items() if isinstance(value, torch.Tensor) and value.dim() > 0][-1]
    if op == "semi_binary_mask":
        name, given["threshold"] = "threshold", torch.ones(18)
    given[name] = given[name].to("meta")
    with pytest.raises(
        InputError, match=f"{op}: all tensors must be on one device, not on (cpu and meta|meta and cpu)"
    ):
        getattr(ops, op)(**given, backend=backend)


def test_a_weight_on_another_device_is_refused():
    given = valid("masked_weights")
    given["weights"][0] = given["weights"][0].to("meta")
    with pytest.raises(InputError, match="masked_weights: all tensors must be on one device, not on meta and cpu"):
        ops.masked_weights(**given)
