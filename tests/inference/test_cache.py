"""W * m kept between passes: when it is, within how much memory, and what serving promises."""

import copy
import gc
import pickle

import pytest
import torch
from support.serving import SHAPES, agree, bytes_of_task, checks_fast, model_of, network, uncached
from torch import nn

import hypermask_fast as hmf
from hypermask_fast.errors import InputError

# -- when it is kept --------------------------------------------------------------------------------------------------


@checks_fast
@torch.no_grad()
def test_the_third_pass_under_the_same_weights_finds_what_the_second_has_kept():
    model, x = model_of(), torch.randn(4, 6)
    model(x, 0)
    assert (model.cache.tasks, model.cache.made, model.cache.hits) == ((), 0, 0)  # one pass is not worth a checksum
    model(x, 0)
    assert (model.cache.tasks, model.cache.made, model.cache.hits) == ((0,), 1, 0)
    kept = model(x, 0)
    assert (model.cache.made, model.cache.hits) == (1, 1)
    assert torch.equal(kept, uncached(model, x, 0))  # to the bit


@checks_fast
@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_all_ways_of_passing_share_what_is_kept(shape):
    model, x = model_of(shape, tasks=4), torch.randn(8, 6)
    ids = torch.tensor([3, 0, 0, 3, 1, 1, 3, 0])
    model(x, 0), model(x, 0)
    agree(model, x, ids)
    assert model.cache.tasks == (0, 1, 3)
    agree(model, x, torch.tensor(2))
    made = model.cache.made
    every = model.forward_all_tasks(x)
    assert model.cache.made == made == 4
    for task in range(4):
        torch.testing.assert_close(every[task], uncached(model, x, task))


@checks_fast
@torch.no_grad()
@pytest.mark.parametrize("tasks", [4, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_pass_gives_the_same_bits_whether_w_m_is_kept_or_made(shape, tasks):
    model, x = model_of(shape, tasks), torch.randn(6, 6)
    ids = torch.tensor([3, 0, 0, 3, 1, 3])
    first = model.forward_all_tasks(x), model(x, ids)
    for _ in range(3):
        assert torch.equal(model.forward_all_tasks(x), first[0]) and torch.equal(model(x, ids), first[1])
    for task in range(tasks):
        assert torch.equal(model(x, model.mask(task)), first[0][task])


@pytest.mark.parametrize(
    "passing",
    [
        lambda model, x: model(x, 0),
        lambda model, x: model.train()(x, 0),
        lambda model, x: torch.no_grad()(model.train())(x, 0),
        lambda model, x: torch.no_grad()(model)(x, model.mask(0)),
        lambda model, x: torch.no_grad()(torch.func.functional_call)(model.train(), {}, (x, 0)),
    ],
)
def test_passes_that_record_gradients_or_train_keep_nothing(passing):
    model, x = model_of(), torch.randn(4, 6)
    for _ in range(3):
        passing(model, x)
    assert model.cache.tasks == () and model.cache.made == 0


@checks_fast
@torch.no_grad()
def test_training_frees_the_memory():
    model, x = model_of(), torch.randn(4, 6)
    model(x, 0), model(x, 0)
    assert model.cache.nbytes == bytes_of_task(model)
    model.train()
    assert model.cache.nbytes == 0 and model.cache.tasks == ()


@checks_fast
def test_what_is_kept_in_inference_mode_serves_outside_of_it():
    model, x = model_of(), torch.randn(4, 6)
    with torch.inference_mode():
        model(x, 0), model(x, 0)
    with torch.no_grad():
        y = model(x, 0)
    assert model.cache.hits == 1 and torch.equal(y, uncached(model, x, 0))


@torch.no_grad()
def test_a_hypernetwork_or_masks_of_ones_own_are_not_kept():
    class Doubled(hmf.HyperMask):
        def mask(self, task, sparsity=None, ranks=None):
            return super().mask(task, 50.0, ranks)

    for kind in (Doubled, hmf.HyperMask):
        model = kind(network(), 2, 10.0, SHAPES["dense"]).eval()
        if kind is hmf.HyperMask:
            model.hypernet.__class__ = type("Own", (type(model.hypernet),), {})
        x = torch.randn(4, 6)
        for _ in range(3):
            agree(model, x, 1)
        assert model.cache.tasks == ()
        with pytest.raises(InputError, match="can't keep the masks of this model"), model.serving():
            pass


# -- how much ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_task_used_least_recently_is_dropped():
    model, x = model_of(tasks=4), torch.randn(4, 6)
    model.cache_bytes = 2 * bytes_of_task(model)
    with model.serving():
        for task in (0, 1, 0, 2):
            agree(model, x, task)
        assert model.cache.tasks == (0, 2)
        assert model.cache.nbytes == model.cache_bytes
        model.cache_bytes = bytes_of_task(model)
        assert model.cache.tasks == (2,)


@torch.no_grad()
def test_a_pass_under_more_tasks_than_there_is_room_for_does_not_drop_its_own():
    model, x = model_of(tasks=4), torch.randn(4, 6)
    model.cache_bytes = 2 * bytes_of_task(model)
    with model.serving():
        for turn in range(3):
            model.forward_all_tasks(x)
            assert model.cache.tasks == (0, 1)
            assert (model.cache.hits, model.cache.made) == (2 * turn, 4 + 2 * turn)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (-1, "cache_bytes must be a whole number, 0 or more, not -1"),
        (1.5, "cache_bytes must be a whole number, 0 or more, not 1.5"),
        (True, "cache_bytes must be a whole number, 0 or more, not True"),
        (100, "cache_bytes=100 is too small for one task, whose W * m takes 200 bytes (0 keeps nothing)"),
    ],
)
def test_bad_numbers_of_bytes_are_refused(asked, said):
    model = model_of()
    with pytest.raises(InputError) as refused:
        model.cache_bytes = asked
    assert str(refused.value) == said
    assert model.cache_bytes == 256 * 2**20


@torch.no_grad()
def test_it_says_what_is_kept():
    model, x = model_of(), torch.randn(4, 6)
    with model.serving():
        model(x, 2), model(x, 0), model(x, 2)
        assert str(model.cache) == (
            "W * m kept of tasks: 0, 2 (0.0 of 256.0 MiB); used 1 times, made 2 times; "
            "checked by version counters (serving)"
        )
    model.cache_bytes = 0
    assert str(model.cache).startswith("W * m kept of tasks: none (turned off); used 1 times")
    assert str(model.cache).endswith("checked by checksums")


def test_copies_and_pickles_keep_nothing_yet():
    model, x = model_of(), torch.randn(4, 6)
    model.cache_bytes = 1000
    with torch.no_grad(), model.serving():
        model(x, 0)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.cache.tasks == () and other.cache.serving == 0 and other.cache_bytes == 1000
            other.train()


# -- serving ----------------------------------------------------------------------------------------------------------


def test_passes_within_serving_record_no_gradient():
    model, x = model_of(), torch.randn(4, 6)
    with model.serving() as same:
        assert same is model
        for y in (model(x, 0), model(x, torch.tensor([0, 1, 1, 0])), model.forward_all_tasks(x)):
            assert not y.requires_grad
    assert model.cache.tasks == (0, 1, 2)
    assert model(x, 0).requires_grad


def test_serving_is_refused_where_it_makes_no_sense():
    model = model_of()
    with pytest.raises(InputError, match="serving\\(\\) is for evaluation: call model.eval\\(\\) first"):
        model.train().serving().__enter__()
    model.eval().cache_bytes = 0
    with pytest.raises(InputError, match="takes 200 bytes, and cache_bytes is 0"):
        model.serving().__enter__()
    model.cache_bytes = 200
    with model.serving(), pytest.raises(InputError, match="leave the block first"):
        model.train()
    assert not model.training
    with torch.inference_mode():
        made_there = model_of()
    with pytest.raises(InputError, match="made in inference mode"):
        made_there.serving().__enter__()


@pytest.mark.parametrize(
    "name", ["hypernet.output.weight", "hypernet.trunk.0.bias", "hypernet.embeddings.1", "net.0.weight"]
)
def test_a_write_that_no_counter_sees_is_found_when_serving_ends(name):
    model, x = model_of(), torch.randn(4, 6)
    said = "in a way that PyTorch does not count, such as p.data: answers for task 1"
    with pytest.raises(InputError, match=said), model.serving():
        model(x, 1)
        model.get_parameter(name).data.mul_(1.5)
    with torch.no_grad():
        agree(model, x, 1)


def test_an_error_within_serving_is_not_hidden_by_what_is_found_at_its_end():
    model, x = model_of(), torch.randn(4, 6)
    with pytest.raises(ZeroDivisionError), model.serving():
        model(x, 1)
        model.hypernet.output.weight.data.mul_(1.5)
        1 / 0  # noqa: B018
    assert model.cache.serving == 0


@torch.no_grad()
def test_what_is_kept_is_made_again_where_somebody_has_written_to_it():
    """A network may return a view of what it reads as its weight."""

    class Showing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(x), self.layer.weight

    model, x = hmf.HyperMask(Showing(), 2, 0.0, SHAPES["dense"], heads="layer").eval(), torch.randn(4, 6)
    with model.serving():
        model(x, 0)
        y, weight = model(x, 0)
        weight.zero_()
        torch.testing.assert_close(model(x, 0)[0], y)


@torch.no_grad()
def test_memory_of_a_dropped_model_is_given_back():
    model, x = model_of(), torch.randn(4, 6)
    with model.serving():
        model(x, 0)
    cache = model.cache
    del model
    gc.collect()
    cache.clear()
    assert cache.nbytes == 0
