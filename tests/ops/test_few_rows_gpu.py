"""The CUDA kernels for few rows on a GPU; `test_few_rows` has them run by a CPU."""

import pytest
import torch
from support.backends import on
from support.tolerances import assert_close

from hypermask_fast.ops import reference


@on("cuda")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_as_close_as_pytorch(backend, rows, dtype):
    """By the rule |ours - fp64| <= 2 |PyTorch in the same dtype - fp64| + eps."""
    device = backend.device
    x, weight = torch.randn(rows, 1000).to(device, dtype), torch.randn(1024, 1000).to(device, dtype)
    hidden, layer, shift = (torch.randn(*s).to(device, dtype) for s in ((129, 64), (8000, 64), (8000,)))
    calls = [("masked_linear", (x, weight, torch.randn_like(weight)))]
    if dtype != torch.float32:
        calls.append(("chunk_masked_linear", (x, weight, hidden, layer, shift, 16)))
    for op, args in calls:
        args = (*args, torch.zeros((), device=device, dtype=dtype))
        wanted = getattr(reference, op)(*(t.double() if isinstance(t, torch.Tensor) else t for t in args))
        ours, theirs = getattr(backend, op)(*args), getattr(reference, op)(*args)
        assert_close(ours, wanted, "cuda", op, peer=theirs, rounding=1)
