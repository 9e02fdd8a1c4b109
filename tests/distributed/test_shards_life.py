"""Everything that is done with a sharded model besides plain steps, on two gloo processes."""

import pytest
import torch
import torch.distributed as dist
from support.loops import in_processes
from support.shard_life import COUNTS, WORK, everything
from support.shards import MLPS, small_model

import hypermask_fast as hmf


@pytest.fixture(scope="module")
def found():
    """What each of two ranks has found."""
    return in_processes(everything, 2)


@pytest.mark.parametrize("work", WORK)
def test_a_sharded_model_does_what_a_model_does(found, work):
    for rank, of_rank in enumerate(found):
        assert not of_rank[work], f"rank {rank}:\n{of_rank[work]}"


@pytest.mark.parametrize("case", COUNTS, ids=str)
def test_a_step_sends_its_logits_and_their_gradient(found, case):
    """Each N numbers of 4 bytes to one other rank or from it, as the target's gradient. Never the layer's, N x H."""
    for rank in found:
        numbers, small = rank[("sent", *case)]
        assert numbers <= 2.2 + small, numbers


@pytest.mark.parametrize("kind", MLPS)
def test_a_rank_holds_its_share_of_the_layer_and_its_moments(found, kind):
    for rank in found:
        assert abs(rank[("held", kind)] - 1 / 2) <= 0.05 / 2


def test_what_cannot_be_sharded_is_refused_on_every_rank(found):
    lines = {
        "twice": "sharded already",
        "replicated": "replicated already",
        "then replicated": "sharded already",
        "no model": "shard takes a HyperMask or a module with one in it; Linear has none",
        "no mesh": "mesh is a DeviceMesh of torch.distributed, not str",
        "names": "is named \"shard\" or not at all, not ('data',)",
        "order": 'has the dimensions ("replicate", "shard")',
        "held": "an optimizer holds the model's parameters already",
        "few": "of 1 chunk can't be cut into equal slices for 2 ranks (the last would have none): the most",
        "shapes": "rank 1 differs from rank 0 in its choice of what is masked: all ranks of a model need the same",
        "tasks": "rank 1 differs from rank 0 in its number of tasks",
        "replicas": "rank 1 differs from rank 0 in its number of tasks",
        "sparsity": "rank 1 differs from rank 0 in its sparsity",
        "dtype": "rank 1 differs from rank 0 in its names, shapes, dtypes or requires_grad of parameters",
    }
    for rank in found:
        for name, line in lines.items():
            assert line in rank["refusals"][name], rank["refusals"][name]
        assert "rank 1: the model's parameters are on several devices, cpu, meta" in rank["refusals"]["devices"]


def test_a_process_group_that_is_gone(tmp_path):
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        model = hmf.distributed.shard(small_model())
    finally:
        dist.destroy_process_group()
    with pytest.raises(hmf.InputError, match="there is no process group"):
        model(torch.randn(4, 8).double(), 0)
