"""Replicas in two processes, by gloo: the numbers of one process on both batches, on every rank."""

import pytest
import torch
from support.loops import in_processes
from support.ranks import ADAM, CASES, RANKS, small_model, train, work

import hypermask_fast as hmf


@pytest.fixture(scope="module")
def found():
    """What each rank has found."""
    return in_processes(work, RANKS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replicas_are_one_model(found, case):
    _, chunk_size, loop, _ = case
    model = small_model(1, chunk_size)
    expected = train(model, model, None, ADAM["torch"], loop)
    mine, theirs = (rank[case] for rank in found)
    for name, value in expected.items():
        assert torch.equal(mine[name], theirs[name]), name
        assert (mine[name] - value).norm() <= 1e-7 * value.norm(), name


def test_a_wrapper_that_is_not_replicated_has_its_gradient_averaged_in_full(found):
    """The same numbers, for N x H of traffic."""
    ours, theirs = ([rank[f"wrapper {replicates}"] for rank in found] for replicates in (True, False))
    for name, value in ours[0].items():
        assert torch.equal(theirs[0][name], theirs[1][name]) and torch.equal(ours[0][name], ours[1][name])
        assert (theirs[0][name] - value).norm() <= 1e-9 * value.norm(), name


def test_a_new_task_is_the_same_on_every_rank(found):
    assert torch.equal(found[0]["new task"], found[1]["new task"])


def test_what_would_leave_ranks_apart_is_refused(found):
    for rank in found:
        said = rank["refusals"]
        assert "DistributedDataParallel(hmf.distributed.replicate(model)) sends N numbers" in said[0]
        assert "hmf.distributed.replicate(model) comes first" in said[1]
        assert said[2] == said[0]  # replicated where it was pickled
        assert "leaves the hypernetwork to each rank: wrap the other way" in said[3]


def test_replicate_without_a_process_group():
    with pytest.raises(hmf.InputError, match="there is no process group"):
        hmf.distributed.replicate(small_model(1))
