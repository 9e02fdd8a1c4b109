"""checksum: a number that changes when a tensor does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serving import checks_fast

from hypermask_fast.ops.checksum import checksum, definition


@checks_fast
@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 255, 256, 257, 65_535, 65_536, 65_537, 200_001, 64 * 1024 * 256 + 7])
def test_the_checksum_is_that_of_its_definition(size):
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    assert checksum(data) == int(definition(data))


@checks_fast
def test_the_checksums_operator_passes_opcheck_and_refuses_what_are_no_bytes():
    operator = torch.ops.hypermask_native.checksum
    torch.library.opcheck(operator.default, (torch.arange(100, dtype=torch.uint8),))
    for bad, said in (
        (torch.zeros(3), "bytes must be uint8"),
        (torch.zeros(3, 3, dtype=torch.uint8), "must have shape"),
        (torch.zeros(6, dtype=torch.uint8)[::2], "must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=said):
            operator(bad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_the_checksum_sees_every_entry(dtype):
    tensor = (torch.randn(7, 11) * 3).to(dtype)
    tensor[0, 1:4] = 0
    found = {checksum(tensor)}
    for i in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1)[i] = other.view(-1)[i] == 0
        found.add(checksum(other))
    assert len(found) == 1 + tensor.numel()
    assert checksum(tensor.t()) == checksum(tensor.t().contiguous()) != checksum(tensor)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40_000), st.integers(0, 31))
def test_the_checksum_sees_bits_that_turn_in_many_entries(seed, count, bit):
    """Where a plain sum or XOR of entries would stay as it is."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (40_000,), generator=generator).int()
    mask = torch.zeros_like(words)
    mask[torch.randperm(40_000, generator=generator)[:count]] = torch.tensor(1 << bit).int()
    assert checksum(words ^ mask) != checksum(words)
