"""The order of samples is drawn block by block, and is the one that was once laid out in one piece."""

from itertools import islice

import pytest
import torch

from hypermask_fast.data import DatasetSplit, TensorSplit
from hypermask_fast.masking.layout import MaskLayout
from hypermask_fast.training import order
from hypermask_fast.training.order import batch_rows, with_ranks


def rows_of(samples, batch_size, iterations, seed, task, start=0):
    return torch.cat(list(batch_rows(samples, batch_size, iterations, seed, task, start)))


def laid_out(samples, batch_size, iterations, seed, task):
    """As version 0.1.0 had it."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + task) % 2**63)
    passes = -(-iterations * batch_size // samples)
    stream = torch.cat([torch.randperm(samples, generator=generator) for _ in range(passes)])
    return stream[: iterations * batch_size].view(iterations, batch_size)


def test_batches_run_over_epoch_borders():
    rows = rows_of(10, 4, 5, seed=0, task=0)
    assert rows.shape == (5, 4)
    stream = rows.flatten().tolist()
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert torch.equal(rows, rows_of(10, 4, 5, seed=0, task=0))
    assert not torch.equal(rows, rows_of(10, 4, 5, seed=0, task=1))
    assert torch.equal(rows_of(10, 4, 9, seed=0, task=0)[:5], rows)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize(("samples", "batch_size"), [(10, 4), (1, 3), (3, 10), (50, 50), (50, 7), (7, 1)])
def test_the_same_numbers_from_every_iteration_on(monkeypatch, block, samples, batch_size):
    monkeypatch.setattr(order, "_BLOCK", block)
    expected = laid_out(samples, batch_size, 25, seed=3, task=2)
    for start in (0, 1, 5, 12, 24):
        blocks = list(batch_rows(samples, batch_size, 25, seed=3, task=2, start=start))
        assert torch.equal(torch.cat(blocks), expected[start:])
        assert max(map(len, blocks)) <= max(block // batch_size, 1)
        assert len({len(rows) for rows in blocks[:-1]}) <= 1 and len(blocks[-1]) <= len(blocks[0])


def test_an_order_without_end_begins_at_once():
    """10^18 iterations: no more is laid out than a block."""
    blocks = list(islice(batch_rows(60_000, 128, 10**18, seed=0, task=0), 2))
    expected = laid_out(60_000, 128, 3 * 8192, seed=0, task=0)
    assert torch.equal(torch.cat(blocks), expected[: 2 * 8192])


def test_every_block_has_the_ranks_of_its_own_iterations():
    layout, split = MaskLayout.of(torch.nn.Linear(10, 10)), TensorSplit(torch.zeros(4, 10), torch.zeros(4).long())
    blocks, asked, cpu = [torch.zeros(2, 3).long(), torch.ones(3, 3).long()], [], torch.device("cpu")

    def ramp(iteration):
        asked.append(iteration)
        return 10.0 * iteration

    found = list(with_ranks(blocks, split, 4, layout, ramp, 50.0, cpu))
    assert asked == [4, 5, 6, 7, 8] and [len(ranks) for _, ranks in found] == [2, 3]
    assert torch.equal(found[1][1][-1], layout.ranks(80.0, cpu)) and torch.equal(found[0][0], blocks[0])
    (_, ranks), *_ = with_ranks(blocks, split, 4, layout, None, 50.0, cpu)
    assert torch.equal(ranks, layout.ranks(50.0, cpu)[None])


def test_rows_are_where_the_split_reads_them():
    layout, meta = MaskLayout.of(torch.nn.Linear(10, 10)), torch.device("meta")
    tensors = TensorSplit(torch.zeros(4, 10), torch.zeros(4).long()).to(meta)
    items = DatasetSplit([(torch.zeros(10), 0)], device=meta)  # which reads by numbers, whose batches go to the device
    for split, place in ((tensors, "meta"), (items, "cpu")):
        ((rows, ranks),) = with_ranks([torch.zeros(2, 3).long()], split, 0, layout, None, 50.0, meta)
        assert (rows.device.type, ranks.device.type) == (place, "meta")
