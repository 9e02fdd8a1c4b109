"""Gradients outside of the hypernetwork in 2 and 3 gloo processes, in loops without DistributedDataParallel.

Every number is that of one process with the whole batch; with 3 ranks their shares are 11, 11 and 10 of 32.
"""

import pytest
import torch
import torch.nn.functional as F
from support import loops, reducing
from torch import nn


@pytest.fixture(scope="module", params=[2, 3])
def found(request):
    return loops.in_processes(reducing.loops, request.param)


def check_close(mine, expected, within=1e-9):
    assert set(mine) == set(expected)
    for name, value in expected.items():
        assert (mine[name] - value).norm() <= within * max(value.norm(), 1e-3), name


@pytest.mark.parametrize("case", reducing.LOOPS, ids=str)
def test_any_loop_is_that_of_one_process(found, case):
    _, optimiser, chunk_size, loop = case
    expected = loops.train(loops.mlp(1, chunk_size), optimiser, loop, alone=True)
    for rank in found:
        check_close(rank[case], expected)
        assert all(torch.equal(rank[case][name], value) for name, value in found[0][case].items())


def of_one_process(model=None, times=1, task=0):
    model = loops.mlp() if model is None else model
    for _ in range(times):
        x, y = loops.data(task, 0)
        mask = model.mask(task)
        (F.cross_entropy(model(x, mask), y) + model.regularizer(mask)).backward()
    return reducing.gradients(model)


@pytest.mark.parametrize("case", ["autograd.grad", "failed", "assigned", "copy"])
def test_the_gradient_is_that_of_one_process(found, case):
    expected = of_one_process()
    for rank in found:
        check_close(rank["cases"][case], expected)


@pytest.mark.parametrize("case", ["checkpoint", "reentrant checkpoint"])
def test_activations_that_are_computed_again(found, case):
    expected = reducing.computed_again(loops.mlp())
    for rank in found:
        check_close(rank["cases"][case], expected)


def test_a_graph_that_is_passed_twice(found):
    for rank in found:
        check_close(rank["cases"]["retain_graph"], of_one_process(times=2))


def test_a_gradient_of_one_rank_alone_is_averaged_and_one_of_none_stays_none(found):
    for rank in found:
        gradient, none = rank["cases"]["one rank alone"]
        assert none
        torch.testing.assert_close(gradient, torch.full((3,), 2.0 / len(found), dtype=torch.float64))


def test_a_frozen_parameter_is_averaged_again_once_it_is_trained(found):
    for rank in found:
        was_there, gradients = rank["cases"]["frozen"]
        assert not was_there
        check_close(gradients, of_one_process())


def test_parameters_of_a_task_that_was_added(found):
    model = loops.mlp()
    model.add_task(like=0)
    of_one_process(model, task=2)
    expected = {f"own.{i}": p.grad for i, p in enumerate(model.own.parameters()) if p.grad is not None}
    assert len(expected) == 2
    for rank in found:
        check_close(rank["cases"]["added"], expected)


def test_a_layer_beside_the_model(found):
    torch.manual_seed(1)
    model = loops.mlp()
    torch.manual_seed(1)
    loops.mlp()
    head = nn.Linear(3, 3).double()
    x, y = loops.data(0, 0)
    F.cross_entropy(head(model(x, 0)), y).backward()
    for rank in found:
        for case in ("wrapper", "wrapper of shards"):
            torch.testing.assert_close(rank["cases"][case], head.weight.grad, rtol=1e-9, atol=1e-12)


def test_sparse_gradients_are_made_dense(found):
    expected = of_one_process()
    for rank in found:
        assert rank["cases"]["sparse"]["net.table.weight"].layout is torch.strided
        check_close(rank["cases"]["sparse"], expected)


def test_several_dtypes(found):
    for rank in found:
        gradients = rank["cases"]["dtypes"]
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32, torch.float64}
        check_close(gradients, of_one_process(), within=1e-5)


def test_float16_does_not_overflow(found):
    for rank in found:
        torch.testing.assert_close(rank["cases"]["half"], torch.full((2,), 4e4, dtype=torch.float16))


def test_an_overflow_on_one_rank_skips_the_step_on_all(found):
    for rank in found:
        assert rank["cases"]["scaler"] == (2.0**15, True)


def test_a_hook_that_steps_within_the_backward_pass_is_refused(found):
    for rank in found:
        assert "a hook has stepped a parameter within the backward pass" in rank["cases"]["hook"]


def test_a_step_sends_two_numbers_per_mask_entry(found):
    for rank in found:
        sent, entries, others, count = rank["cases"]["sent"]
        assert sent == [entries + 1, others + count]


def test_ranks_that_train_different_tasks_are_told(found):
    for rank in found:
        said, gradients = rank["cases"]["other tasks"]
        assert said.startswith("ranks make backward passes of different tasks, here of ")
        check_close(gradients, of_one_process())


def test_a_pass_without_a_mask(found):
    for rank in found:
        torch.testing.assert_close(rank["cases"]["penalty"].item(), (len(found) - 1) / 2)


def test_a_model_that_each_process_trains_alone_says_so_once(found):
    for rank in found:
        (said,) = rank["cases"]["alone"]
        assert "this model is trained by each process alone: hmf.distributed.replicate(model)" in said
