"""Triton's operators as PyTorch sees them: schemas, shape functions, gradients, graphs, the device they run on."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from support.arguments import TRITON_ARGUMENTS
from support.comparing import DEVICE, randn
from torch._dynamo.utils import counters

from hypermask_fast import InputError
from hypermask_fast.ops.triton import operator

NAMESPACE = "hypermask_triton"


@pytest.mark.parametrize("name", TRITON_ARGUMENTS)
def test_triton_operators_pass_opcheck(triton, name):
    torch.library.opcheck(operator(name).default, TRITON_ARGUMENTS[name]())


def test_every_triton_operator_is_checked(triton):
    defined = (schema.name.split("::") for schema in torch._C._jit_get_all_schemas())
    assert {name for namespace, name in defined if namespace == NAMESPACE} == set(TRITON_ARGUMENTS)


# Tensors of which half is an argument too.
HALVES = {
    ("semi_binary_mask", 0), ("semi_binary_mask_with_slope", 0), ("entropy_select", 0), ("masked_conv2d", 0),
    ("chunk_masked_conv2d", 0), ("chunk_masked_conv2d", 1),
}  # fmt: skip


def another_shape(value):
    if isinstance(value, list):
        return [another_shape(value[0]), *value[1:]]
    return value[..., : value.shape[-1] // 2] if value.dim() else value.expand(2)


@pytest.mark.parametrize("name", TRITON_ARGUMENTS)
def test_triton_operators_called_directly_refuse_what_does_not_fit(triton, name):
    """Every tensor of every operator, those of the backward passes too: nothing is read beyond an end."""
    for i, value in enumerate(TRITON_ARGUMENTS[name]()):
        tensors = isinstance(value, torch.Tensor) or (isinstance(value, list) and isinstance(value[0], torch.Tensor))
        if not tensors or (name, i) in HALVES:
            continue
        arguments = list(TRITON_ARGUMENTS[name]())
        arguments[i] = another_shape(value)
        with pytest.raises(InputError):
            operator(name)(*arguments)


def own(values, task):
    """Those of one task, whose id is a tensor (1,)."""
    return values.index_select(0, task)[0]


# An op under a task that is a tensor, as a compiled model calls it, and the shapes of what it differentiates; what each
# of the two tasks has of its own comes first. Those of the layers: test_layer_ops.py.
COMPILED = {
    "semi_binary_mask": (lambda op, task, limits, a: op(own(a, task), own(limits, task)), ((2, 3, 5),)),
    "masked_weights": (
        lambda op, task, limits, a, v, w: torch.cat(
            [m.flatten() for m in op((v, w), own(a, task), limits, (0, 6, 10))]
        ),
        ((2, 10), (2, 3), (4,)),
    ),
    "entropy_select": (lambda op, task, limits, x: op(x * own(limits, task)), ((3, 4, 5),)),
    "weight_drift": (
        lambda op, task, limits, a, v, w: op((v, w), own(a, 1 - task), (0, 6, 10), 2, own(a, task), limits),
        ((2, 10), (2, 3), (4,)),
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_triton_operators_compile_to_one_graph_for_all_tasks(triton, name):
    """Forward and backward without a graph break, the eager numbers, and no other code for another task."""
    call, shapes = COMPILED[name]
    step = lambda *tensors: call(getattr(triton, name), *tensors)  # noqa: E731
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    counters.clear()
    for task, limits in ((0, (0.3, 0.4)), (1, (0.5, 0.2))):
        leaves = [randn(*shape).requires_grad_() for shape in shapes]
        given = torch.tensor([task], device=DEVICE), torch.tensor(limits, device=DEVICE), *leaves
        y, expected = compiled(*given), step(*given)
        assert torch.equal(y, expected)
        if y.is_floating_point():
            seed = torch.randn_like(y)
            ours, theirs = (torch.autograd.grad(found, leaves, seed) for found in (y, expected))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a process where Triton's interpreter can be on and off")
def test_triton_operators_without_the_interpreter_say_what_to_do_with_cpu_tensors(triton):
    program = (
        "import torch; from hypermask_fast.kernels import masked_linear\n"
        "o = torch.ones(2, 2)\n"
        "try: masked_linear(o, o, o, o.sum())\n"
        "except ValueError as error: print(type(error).__name__, error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=os.getcwd()
    )
    assert answer.stdout.startswith("InputError Triton kernels need CUDA tensors"), answer.stderr


def test_triton_launches_on_the_tensors_own_device(triton, monkeypatch):
    """With several GPUs the current one may be another."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor) or contextlib.nullcontext())
    weight, logits = randn(3), randn(3)
    run = triton.host.on_its_device(lambda *args: len(entered))
    assert run([weight], logits) == 1 and run([], logits) == 2
    assert entered[0] is weight and entered[1] is logits
