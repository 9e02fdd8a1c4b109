"""No change of a model escapes the cache: single changes, sequences of them, and threads."""

import copy
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serving import SHAPES, agree, model_of, uncached
from torch import nn

import hypermask_fast as hmf
from hypermask_fast.masking.cache import Counted
from hypermask_fast.ops import native


def step(kind):
    """A training step by an optimiser of this kind; the model is in evaluation mode again afterwards."""

    def change(model):
        model.train()
        optimizer = kind(model)
        for _ in range(2):
            x = torch.randn(6, 6).to(model.net[0].weight.dtype)
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
