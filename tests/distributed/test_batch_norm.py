"""Normalisation in 2 and 3 gloo processes: synchronised batch norm is that of one process with the whole batch.

With 3 ranks their shares are 11, 11 and 10 of 32.
"""

import pytest
import torch
import torch.nn.functional as F
from support import loops, normalising
from support.normalising import DTYPES, FIDELITIES, OTHERS, convnet, images, trained


@pytest.fixture(scope="module", params=[2, 3])
def found(request):
    return loops.in_processes(normalising.work, request.param)


def check_one_model(found, case, expected, within=1e-9):
    for rank in found:
        assert set(rank[case]) == set(expected)
        for name, value in expected.items():
            if value.is_floating_point():
                assert (rank[case][name] - value).norm() <= within * max(value.norm(), 1e-2), name
            assert torch.equal(rank[case][name], found[0][case][name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_losses_parameters_and_statistics(found, fidelity, dtype):
    expected = trained(convnet(fidelity=fidelity, dtype=dtype), alone=True, dtype=dtype)
    check_one_model(found, (fidelity, dtype), expected, 1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("kind", ["SyncBatchNorm", "untracked", "cumulative", "activated"])
def test_batch_norms_of_other_kinds(found, kind):
    check_one_model(found, kind, trained(convnet(kind), alone=True))


def test_a_sharded_model(found):
    check_one_model(found, "shard", trained(convnet(), alone=True))


def test_a_batch_of_several_tasks(found):
    check_one_model(found, "mixed", trained(convnet(), loop="mixed", alone=True))


def test_affine_parameters_per_task(found):
    check_one_model(found, "own norms", trained(convnet(per_task="norm"), alone=True))


@pytest.mark.parametrize("kind", OTHERS)
def test_normalisations_of_each_sample_need_nothing(found, kind):
    expected = trained(convnet(kind), alone=True)
    if kind == "InstanceNorm2d":  # its statistics are means over samples, which the ranks' shares weigh alike
        expected = {name: value for name, value in expected.items() if "running" not in name}
        found = [{kind: {name: rank[kind][name] for name in expected}} for rank in found]
    check_one_model(found, kind, expected)


def gradients(x, y):
    model = convnet()
    F.cross_entropy(model(x, 0), y).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_block_that_is_computed_again(found):
    expected = gradients(*images(0, 0))
    for rank in found:
        assert set(rank["checkpointed"]) == set(expected)
        for name, value in expected.items():
            assert (rank["checkpointed"][name] - value).norm() <= 1e-9 * max(value.norm(), 1e-2), name


def test_one_sample_of_each_rank(found):
    x, y = (tensor[: len(found)] for tensor in images(0, 0))
    expected = gradients(x, y)["net.1.weight"]
    for rank in found:
        torch.testing.assert_close(rank["one_sample_each"], expected, rtol=1e-9, atol=1e-12)


def test_evaluation_by_batch_statistics(found):
    model = convnet(fidelity="official").eval()
    expected = model(images(0, 0)[0][: len(found) - 1], 0).detach()
    for rank in found:
        y, start, stop = rank["in_evaluation"]
        torch.testing.assert_close(y, expected[start:stop], rtol=1e-9, atol=1e-12)


def test_a_rank_evaluates_alone(found):
    model = convnet(fidelity="official").eval()
    torch.testing.assert_close(found[0]["without_evaluation"], model(images(0, 0)[0], 0))


def test_statistics_that_are_not_synchronised_are_the_ranks_means(found):
    for rank in found:
        mine, mean = rank["averaged_statistics"]
        assert len(mean) == 8
        for name, value in mean.items():
            torch.testing.assert_close(mine[name], value, rtol=1e-12, atol=1e-12)
            assert torch.equal(mine[name], found[0]["averaged_statistics"][0][name])


def test_what_cannot_be_synchronised_is_refused(found):
    for rank in found:
        assert rank["one_value"].startswith("Expected more than 1 value per channel")
        assert "needs samples of the same tasks on every rank" in rank["other_tasks"]
        assert "Own has a batch norm of its own, which can't be synchronised" in rank["own_statistics"]
        assert rank["refusals"][0].startswith("synchronise_batch_norm follows hmf.distributed.replicate")
        assert rank["refusals"][1] == "HyperMask has no HyperMask model with batch norm in it"


def test_nothing_is_left_in_a_plain_network(found):
    for rank in found:
        assert not [name for name in rank["exported"] if name.startswith("Masked")]
