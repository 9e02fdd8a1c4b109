"""A sharded hypernetwork on 1 to 4 processes, by gloo: the numbers of one process on the same global batches."""

import functools

import pytest
import torch
from support.loops import in_processes
from support.shards import CASES, DRAWING, DRAWN, OF_MESH, small_model, steps_of, train, work

import hypermask_fast as hmf


@functools.cache
def found(ranks):
    """What each of so many ranks has found."""
    return in_processes(work, ranks)


@functools.cache
def one_process(kind, dtype, steps, drift_tasks=None):
    model = small_model(kind, dtype)
    torch.manual_seed(7)
    return train(model, model, "torch", steps, dtype=dtype, drift_tasks=drift_tasks)


def check(of_ranks, case, drift_tasks=None):
    """Every rank has the same numbers, and they are one process's."""
    kind, _, dtype = case
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    losses, parameters = one_process(kind, dtype, steps_of(case), drift_tasks)
    for found, values in of_ranks:
        torch.testing.assert_close(found, losses, rtol=tolerance, atol=0)
        for name, value in parameters.items():
            assert torch.equal(values[name], of_ranks[0][1][name]), name
            if value.is_floating_point():
                assert (values[name] - value).norm() <= tolerance * value.norm(), name
            else:
                assert torch.equal(values[name], value), name


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_are_one_model(ranks, case):
    check([rank[case] for rank in found(ranks)], case)


@pytest.mark.parametrize("ranks", DRAWING)
@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_shards_draw_the_same_tasks_for_the_output_drift(ranks, case):
    """Those of the first rank, whatever the others' generators would have drawn."""
    check([rank[("drawn", *case)] for rank in found(ranks)], case, drift_tasks=1)


@pytest.mark.parametrize("case", OF_MESH, ids=str)
def test_replicas_of_shards_are_one_model(case):
    check([rank[("mesh", *case)] for rank in found(4)], case)


def test_shard_without_a_process_group():
    with pytest.raises(hmf.InputError, match="there is no process group"):
        hmf.distributed.shard(small_model())
