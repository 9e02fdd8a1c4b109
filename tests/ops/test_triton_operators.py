"""Triton's operators as PyTorch sees them, and where they run."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from support.arguments import TRITON_ARGUMENTS
from support.comparing import DEVICE, randn


@pytest.mark.parametrize("name", TRITON_ARGUMENTS)
def test_opcheck(triton, name):
    torch.library.opcheck(getattr(torch.ops.hypermask_triton, name).default, TRITON_ARGUMENTS[name]())


def test_every_operator_is_checked(triton):
    prefix = "hypermask_triton::"
    ours = {name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    assert ours == set(TRITON_ARGUMENTS)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is there")
def test_cpu_tensors_without_the_interpreter_say_what_to_do(triton):
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


def test_launches_on_the_tensors_own_device(triton, monkeypatch):
    """With several GPUs the current one may be another."""
    from hypermask_fast.kernels import host

    entered = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: entered.append(tensor) or contextlib.nullcontext())
    weight, logits = randn(3), randn(3)
    run = host.on_its_device(lambda *args: len(entered))
    assert run([weight], logits) == 1 and run([], logits) == 2
    assert entered[0] is weight and entered[1] is logits
