"""A sharded hypernetwork on 1 to 4 processes, by gloo: the numbers of one process on the same global batches."""

import functools
import socket

import pytest
import torch
from support.shards import CASES, DRAWN, OF_MESH, rank_of, small_model, train
from torch.multiprocessing.spawn import spawn

import hypermask_fast as hmf


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of so many ranks has found."""

    @functools.cache
    def of(ranks):
        folder = tmp_path_factory.mktemp("ranks")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        spawn(rank_of, (ranks, port, str(folder)), nprocs=ranks)
        return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]

    return of


@functools.cache
def one_process(kind, dtype, drift_tasks=None):
    model = small_model(kind, dtype)
    torch.manual_seed(7)
    return train(model, model, "torch", dtype=dtype, drift_tasks=drift_tasks)


def check(of_ranks, kind, dtype, drift_tasks=None):
    """Every rank has the same numbers, and they are one process's."""
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    losses, parameters = one_process(kind, dtype, drift_tasks)
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
def test_shards_are_one_model(found, ranks, case):
    kind, _, dtype = case
    check([rank[case] for rank in found(ranks)], kind, dtype)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_shards_draw_the_same_tasks_for_the_output_drift(found, ranks, case):
    """Those of the first rank, whatever the others' generators would have drawn."""
    kind, _, dtype = case
    check([rank[("drawn", *case)] for rank in found(ranks)], kind, dtype, drift_tasks=1)


@pytest.mark.parametrize("case", OF_MESH, ids=str)
def test_replicas_of_shards_are_one_model(found, case):
    kind, _, dtype = case
    check([rank[("mesh", *case)] for rank in found(4)], kind, dtype)


def test_shard_without_a_process_group():
    with pytest.raises(hmf.InputError, match="there is no process group"):
        hmf.distributed.shard(small_model())
