"""W * m kept between passes: when it is, within how much memory, and that no change of a model escapes it."""

import copy
import gc
import pickle
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hypermask_fast as hmf
from hypermask_fast.errors import InputError
from hypermask_fast.masking.cache import Counted
from hypermask_fast.ops import native
from hypermask_fast.ops.checksum import checksum, definition

checks_fast = pytest.mark.skipif(bool(native.PROBLEM), reason="without the extension W * m is kept in serving() only")
SHAPES = {
    "dense": hmf.HypernetConfig(embedding=4, hidden=(8,)),
    "chunked": hmf.HypernetConfig(embedding=4, hidden=(8,), chunk_size=20, chunk_embedding=3),
}


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def model_of(shape="dense", tasks=3, sparsity=30.0, **how):
    torch.manual_seed(0)
    return hmf.HyperMask(network(), tasks, sparsity, SHAPES[shape], **how).eval()


def uncached(model, *inputs, **kwargs):
    """The same pass as the model makes it without its cache."""
    limit, model.cache.limit = model.cache.limit, 0
    try:
        with torch.no_grad():
            return model(*inputs, **kwargs)
    finally:
        model.cache.limit = limit


def agree(model, x, task):
    torch.testing.assert_close(model(x, task), uncached(model, x, task), rtol=1e-5, atol=1e-6)


def bytes_of_task(model):
    return sum(w.nbytes for w, s in zip(model.weights(), model.layout.segments, strict=True) if s.selected)


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
        (-1, "cache_bytes is a whole number of bytes, 0 or more, not -1"),
        (1.5, "cache_bytes is a whole number of bytes, 0 or more, not 1.5"),
        (True, "cache_bytes is a whole number of bytes, 0 or more, not True"),
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


# -- no change escapes ------------------------------------------------------------------------------------------------


def step(kind):
    """A training step by an optimiser of this kind; the model is in evaluation mode again afterwards."""

    def change(model):
        model.train()
        optimizer = kind(model)
        for _ in range(2):
            x = torch.randn(6, 6)
            mask = model.mask(model.tasks[-1])
            loss = nn.functional.cross_entropy(model(x, mask), torch.randint(3, (6,))) + model.regularizer(mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()

    return change


def data_of(name, how):
    def change(model):
        how(model.get_parameter(name) if "." in name else getattr(model, name))

    return change


def loaded(assign):
    def change(model):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for name in state:
            if not name.startswith("state.") and state[name].is_floating_point():
                state[name] = state[name] * 1.25
        model.load_state_dict(state, assign=assign)

    return change


def removed(model):
    if len(model.tasks) > 1:
        model.remove_task(model.tasks[0])


def sparser(model):
    model.sparsity = 60.0 - model.sparsity


def rebound(parameter):
    parameter.data = parameter.detach().clone() * 0.5


def swapped(parameter):
    """Rows exchanged: every sum over the tensor stays as it is."""
    parameter.data[:2] = parameter.data[:2].flip(0)


def exchanged(model):
    layer = model.hypernet.output
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5)


def by_numpy(model):
    model.hypernet.output.weight.detach().numpy()[0, 0] += 1.0


def of_other_dtype(model):
    model.to(torch.float64 if model.hypernet.output.weight.dtype == torch.float32 else torch.float32)


COUNTED = {
    "torch Adam": step(lambda m: torch.optim.Adam(m.parameters(), 0.05)),
    "torch Adam foreach": step(lambda m: torch.optim.Adam(m.parameters(), 0.05, foreach=True)),
    "torch Adam fused": step(lambda m: torch.optim.Adam(m.parameters(), 0.05, fused=True)),
    "torch SGD": step(lambda m: torch.optim.SGD(m.parameters(), 0.5, momentum=0.9)),
    "hmf Adam": step(lambda m: hmf.optim.Adam(m, 0.05)),
    "hmf AdamW": step(lambda m: hmf.optim.AdamW(m, 0.05)),
    "hmf Adam in backward": step(lambda m: hmf.optim.Adam(m, 0.05, step_in_backward=True)),
    "load_state_dict": loaded(False),
    "load_state_dict assign": loaded(True),
    "add_task": lambda m: m.add_task(like=m.tasks[-1]),
    "add_task fresh": lambda m: m.add_task(),
    "remove_task": removed,
    "freeze_task": lambda m: m.freeze_task(m.tasks[0]),
    "sparsity": sparser,
    "begin_task": lambda m: m.begin_task(m.tasks[-1]),
    "new Parameter": exchanged,
    "dtype": of_other_dtype,
    "train and eval": lambda m: m.train().eval(),
    "copy_": lambda m: torch.no_grad()(m.net[0].weight.copy_)(m.net[0].weight * 2),
}
STEPS = {name for name in COUNTED if name.startswith(("torch", "hmf"))}
UNCOUNTED = {
    "data of the output layer": data_of("hypernet.output.weight", lambda p: p.data.mul_(1.5)),
    "one entry": data_of("hypernet.output.weight", lambda p: p.data[3, 2].add_(1.0)),
    "signs": data_of("hypernet.output.weight", lambda p: p.data.neg_()),
    "rows exchanged": data_of("hypernet.output.weight", swapped),
    "data of the trunk": data_of("hypernet.trunk.0.weight", lambda p: p.data.mul_(1.5)),
    "data of an embedding": data_of("hypernet.embeddings.1", lambda p: p.data.add_(1.0)),
    "data of the network": data_of("net.0.weight", lambda p: p.data.mul_(-2.0)),
    "data of the head's bias": data_of("net.3.bias", lambda p: p.data.add_(1.0)),
    "other data": data_of("hypernet.output.weight", rebound),
    "other data of the network": data_of("net.3.weight", rebound),
    "by numpy": by_numpy,
}


def goes_through(model, changes, x):
    """Passes before, between and after changes of the model, each compared with the same pass without a cache."""
    for change in changes:
        for task in model.tasks:
            with torch.no_grad():
                agree(model, x.to(model.net[0].weight.dtype), task)
        change(model)
    tasks = torch.tensor(model.tasks).repeat(4)
    with torch.no_grad():
        x = x.to(model.net[0].weight.dtype)
        for task in model.tasks:
            agree(model, x, task)
        agree(model, x[: len(tasks)] if len(tasks) <= len(x) else x.repeat(4, 1)[: len(tasks)], tasks)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*COUNTED, *UNCOUNTED])
def test_every_single_change_is_seen(name, shape):
    model, x = model_of(shape), torch.randn(40, 6)
    changes = [lambda m: None, lambda m: None, (COUNTED | UNCOUNTED)[name], lambda m: None]
    goes_through(model, changes, x)
    assert bool(model.cache.hits) == (not native.PROBLEM)


@pytest.mark.parametrize("name", sorted(COUNTED.keys() - STEPS - {"train and eval"}))
def test_every_counted_change_is_seen_within_serving(name):
    model, x = model_of(), torch.randn(40, 6)
    with model.serving():
        goes_through(model, [lambda m: None, COUNTED[name], lambda m: None], x)
        assert model.cache.hits


@pytest.mark.parametrize("name", sorted(STEPS))
def test_steps_of_every_optimiser_are_counted(name):
    """By a model that shares its Parameters with the one that serves."""
    model = model_of()
    x = torch.randn(40, 6)
    trained = copy.copy(model)
    trained.cache = type(model.cache)()
    with model.serving():
        before = [model(x, task) for task in model.tasks]
        COUNTED[name](trained)
        for task in model.tasks:
            agree(model, x, task)
        assert not torch.equal(model(x, model.tasks[-1]), before[-1])


def test_another_parameter_over_the_same_memory_is_another():
    """It counts for itself, and may have counted as far."""
    weight = torch.zeros(3)
    seen = Counted(None, [weight])
    other = nn.Parameter(weight.data)
    assert other._version == weight._version and other.data_ptr() == weight.data_ptr()
    assert seen.still(None, [weight]) and not seen.still(None, [other]) and not seen.still("other", [weight])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_no_sequence_of_changes_serves_a_stale_mask(data):
    shape = data.draw(st.sampled_from(sorted(SHAPES)))
    how = data.draw(st.sampled_from([{}, {"per_task": "norm"}, {"fidelity": "official"}]))
    room = data.draw(st.sampled_from([200, 450, 10_000]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_of(shape, tasks=2, sparsity=data.draw(st.sampled_from([0.0, 30.0])), **how)
        model.cache_bytes = room
        names = data.draw(st.lists(st.sampled_from(sorted(COUNTED | UNCOUNTED)), max_size=6))
        if data.draw(st.booleans()):
            names.append("copy")
        for name in names:
            if name == "copy":
                model = copy.deepcopy(model)
                continue
            goes_through(model, [lambda m: None, (COUNTED | UNCOUNTED)[name]], torch.randn(40, 6))


@torch.no_grad()
def test_threads_with_tasks_of_their_own_and_one_that_changes_the_model():
    model = model_of(tasks=2)
    x = torch.randn(4, 6)
    states = []
    for scale in (1.0, -2.0):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        states[-1]["net.0.weight"] *= scale
    allowed = []
    for state in states:
        model.load_state_dict(state)
        allowed.append([uncached(model, x, task) for task in range(2)])
    weight, wrong, done = dict(model.named_parameters())["net.0.weight"], [], threading.Event()

    def serve(task):
        while not done.is_set():
            with torch.no_grad():
                y = model(x, task)
            if not any(torch.allclose(y, of_state[task], atol=1e-5) for of_state in allowed):
                wrong.append(task)

    threads = [threading.Thread(target=serve, args=(task,)) for task in range(2)]
    for thread in threads:
        thread.start()
    for turn in range(30):
        weight.copy_(states[turn % 2]["net.0.weight"])  # nobody sees half of a tensor as small as this
        for _ in range(3):
            y = model(x, turn % 2)
        torch.testing.assert_close(y, allowed[turn % 2][turn % 2])
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []


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


# -- the checksum -----------------------------------------------------------------------------------------------------


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
