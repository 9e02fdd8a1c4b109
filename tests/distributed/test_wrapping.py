"""What may be around a model in two processes: DistributedDataParallel averages what is its own, and once."""

import pytest
import torch
import torch.nn.functional as F
from support import loops, reducing, wrapping
from support.normalising import convnet, images

RANKS = 2


@pytest.fixture(scope="module")
def found():
    return loops.in_processes(wrapping.work, RANKS)


def check_close(mine, expected, within=1e-9):
    assert set(mine) == set(expected)
    for name, value in expected.items():
        assert (mine[name] - value).norm() <= within * max(value.norm(), 1e-3), name


@pytest.fixture(scope="module")
def expected():
    """Gradients of one process."""
    model = loops.mlp(per_task=None)
    reducing.loss_of(model).backward()
    return reducing.gradients(model)


@pytest.mark.parametrize("case", wrapping.LOOPS, ids=str)
def test_loops_in_distributed_data_parallel(found, case):
    _, optimiser, kind = case
    alone = loops.train(loops.mlp(per_task=None), optimiser, kind, alone=True)
    for rank in found:
        check_close(rank[case], alone)
        assert all(torch.equal(value, found[0][case][name]) for name, value in rank[case].items())


def test_gradients_are_sent_once(found, expected):
    """Through the wrapper this library sends the logits' gradient and no more; past it the others', too."""
    for rank in found:
        sent, gradients = rank["who sends"]
        assert sent == [1, 2, 1]
        check_close(gradients, expected)


def test_no_sync_leaves_all_to_the_last_part(found, expected):
    for rank in found:
        sent, gradients = rank["no_sync"]
        assert sent == [1, 1]
        check_close(gradients, expected)


@pytest.mark.parametrize("case", ["past the wrapper", "evaluation", "block"])
def test_a_pass_outside_of_the_wrapper_is_averaged_too(found, case, expected):
    for rank in found:
        check_close(rank[case], expected)


def test_a_pass_without_a_backward_pass(found, expected):
    for rank in found:
        first, second, gradients = rank["without backward"]
        assert (first, second) == (1, 2)
        check_close(gradients, expected)


@pytest.mark.parametrize("case", ["mask inside", "mask outside", "unused"])
def test_a_module_with_the_model_in_it(found, case):
    wrapped = wrapping.Wrapped(loops.mlp(per_task=None))
    x, y = loops.data(0, 0)
    F.cross_entropy(wrapped(x, 0), y).backward()
    for rank in found:
        sent, gradients = rank[case]
        assert sent == 1
        check_close(gradients, reducing.gradients(wrapped))


def test_statistics_of_batch_norm_are_the_ranks_means(found):
    for rank in found:
        mine, mean = rank["statistics"]
        for name, value in mean.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-12, atol=1e-12)


def test_synchronised_batch_norm(found):
    alone = loops.train(convnet(), "default", alone=True, batch=images)
    for rank in found:
        check_close({n: v.double() for n, v in rank["synchronised"].items()}, {n: v.double() for n, v in alone.items()})


def test_parameters_that_others_have_sharded_are_refused_before_the_first_step(found):
    for rank in found:
        assert len(rank["shards"]) == 17
        for name, said in rank["shards"].items():
            assert "is sharded by FSDP" in said or "is a DTensor" in said, (name, said)
            assert "hmf.distributed.shard(model)" in said and "\n" not in said


def test_what_distributed_data_parallel_would_do_wrong_is_refused(found):
    for rank in found:
        network, whole, unused, beside = rank["others"]
        assert "DistributedDataParallel(model.net) knows nothing of masks" in network
        assert "DistributedDataParallel(Wrapped) would send the output layer's gradient" in whole
        assert "find_unused_parameters=True" in unused
        assert beside == "not refused"  # what is sharded beside the model is not this library's
