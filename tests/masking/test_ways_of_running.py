"""A network's ways of running, each under the mask or refused: hooks, dtypes, inputs and outputs."""

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.module_kinds import joined, masked_state
from support.modules import Fields, HeadFirst, Two, TwoHeads, as_dict, as_pair, perceptron
from support.networks import blob_model
from support.tolerances import assert_close
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

import hypermask_fast as hmf
from hypermask_fast import InputError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SMALL = hmf.HypernetConfig(embedding=6, hidden=(8,))
TASKS = torch.tensor([2, 0, 1, 0])


def model_of(net: nn.Module, **settings) -> hmf.HyperMask:
    torch.manual_seed(0)
    return hmf.HyperMask(net, 3, 30, SMALL, **settings).eval()


def batch(*shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 16)), generator=torch.Generator().manual_seed(1))


# -- hooks and instance-level forward ---------------------------------------------------------------------------------


def add_hook(module: nn.Module, before: Callable) -> None:
    """What accelerate's add_hook_to_module does: the instance gets a forward of its own."""
    old = module.forward

    def forward(module, *args, **kwargs):
        return module._old_forward(*before(module, *args), **kwargs)

    module._old_forward = old
    module.forward = functools.update_wrapper(functools.partial(forward, module), old)


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_instance_forward_keeps_the_mask(when):
    net, seen = perceptron(), []
    hook = lambda module, x: (seen.append(module) or x,)  # noqa: E731
    if when == "before":
        add_hook(net[0], hook)
    plain = perceptron()
    plain.load_state_dict(net.state_dict())
    model = model_of(net)
    if when == "after":
        add_hook(net[0], hook)
    x = batch()
    y = model(x, 1)
    assert seen == [net[0]]
    expected = functional_call(plain, masked_state(model, 1), (x,))
    assert_close(y, expected, "network")
    grads = [torch.autograd.grad(value.square().sum(), model.weights()) for value in (y, expected)]
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, "network")


@pytest.mark.parametrize("where", ["around", "inside"])
def test_parametrised_weights_that_are_kept_are_the_tasks(where):
    """`parametrize.cached` keeps a weight until its block ends, which here is a weight of W * m."""

    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if where == "around":
                return super().forward(x)
            with parametrize.cached():
                return super().forward(x) + super().forward(2 * x)

    net = Twice(parametrizations.weight_norm(nn.Linear(16, 8)), nn.Linear(8, 3))
    model, x = model_of(net, include=["0.*", "1.*"], heads="1"), batch()
    expected = [model(x, task) for task in range(3)]
    with parametrize.cached():
        for task in (0, 1, 2, 0):
            assert_close(model(x, task), expected[task], "network")
        with model.disabled():
            net(x)
        assert_close(model(x, 1), expected[1], "network")
    assert not torch.equal(expected[0], expected[1])


def test_hooks_see_the_masked_weight():
    net = perceptron()
    model, seen = model_of(net), []
    net[0].register_forward_hook(lambda module, args, y: seen.append((module.weight, y)))
    net[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    y, state = model(batch(), 1), masked_state(model, 1)
    ((weight, inner),) = seen
    assert_close(weight, state["0.weight"], "network")
    assert_close(y, F.linear(2 * inner.relu(), state["2.weight"], net[2].bias), "network")
    assert net[0].weight is net[0]._parameters["weight"]


# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_networks_of_other_dtypes(dtype):
    """The hypernetwork is float32, float64 where the network is; W * m is rounded once."""
    net = perceptron().to(dtype)
    plain = copy.deepcopy(net)
    model = model_of(net)
    assert model.hypernet.output.weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    x = batch().to(dtype)
    y, expected = model(x, 1), functional_call(plain, masked_state(model, 1), (x,))
    assert y.dtype == dtype
    assert torch.equal(y, expected) or torch.allclose(y.double(), expected.double(), rtol=0, atol=1e-6)
    parameters = [*model.weights(), *model.hypernet.parameters()]
    for value in (y, expected):
        for parameter in parameters:
            parameter.grad = None
        value.float().square().sum().backward()
        assert all(p.grad is None or (p.grad.dtype == p.dtype and p.grad.isfinite().all()) for p in parameters)
    if dtype == torch.float16:
        with pytest.raises(InputError, match="eps is 0 in float16"):
            hmf.optim.Adam(model)
        return
    optimizer = hmf.optim.Adam(model, lr=1e-3)
    optimizer.zero_grad()
    for task in (0, 1):
        mask = model.train().mask(task)
        loss = F.cross_entropy(model(x, mask).float(), torch.tensor([0, 1, 0, 1]))
        (loss + model.regularizer(mask)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("first", [torch.bfloat16, torch.float32])
def test_whichever_layer_comes_first_decides_nothing(first):
    net = perceptron()
    net[0 if first == torch.bfloat16 else 2].to(torch.bfloat16)
    assert model_of(net).hypernet.output.weight.dtype == torch.float32


# -- meta devices and lazy modules ------------------------------------------------------------------------------------


def test_a_network_on_meta_is_refused_until_it_is_there():
    with torch.device("meta"):
        net = perceptron()
    before = {name: type(module) for name, module in net.named_modules()}
    with pytest.raises(InputError, match="meta") as caught:
        model_of(net)
    assert "\n" not in str(caught.value)
    assert {name: type(module) for name, module in net.named_modules()} == before
    net.to_empty(device="cpu")
    plain = perceptron()
    net.load_state_dict(plain.state_dict())
    model = model_of(net)
    assert_close(model(batch(), 1), functional_call(plain, masked_state(model, 1), (batch(),)), "network")


def test_lazy_modules_are_refused_until_they_are_there():
    net = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2))
    with pytest.raises(InputError, match="lazy"):
        model_of(net)
    net(batch())
    assert model_of(net)(batch(), 1).shape == (4, 2)


@pytest.mark.parametrize("convert", ["script", "quantise"])
def test_copies_of_weights_in_c_are_refused(convert):
    net = perceptron()
    if convert == "script":
        net[0] = torch.jit.script(net[0])
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    types = [type(module) for module in net.modules()]
    with pytest.raises(InputError, match="scripted or quantised|nothing to mask") as caught:
        model_of(net)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in net.modules()] == types


# -- outputs and inputs, by every entry point -------------------------------------------------------------------------


MADE = {"tuple": as_pair, "named": Two, "dict": as_dict, "dataclass": Fields}


def parts(y) -> list[Tensor]:
    """The two heads' results in any of them."""
    return [*(vars(y) if isinstance(y, Fields) else y).values()] if isinstance(y, (Fields, dict)) else [*y]


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("named", [False, True], ids=["positional", "keyword"])
def test_several_inputs_and_outputs_by_every_entry_point(made, named):
    model = model_of(TwoHeads(MADE[made]))
    x, scale = batch(), 1 + batch(4, 1)
    args, kwargs = ((x,), {"scale": scale}) if named else ((x, scale), {})
    alone = [model(*args, **kwargs, task=t) for t in range(3)]
    if not named:
        assert torch.equal(joined(model(x, scale, 1)), joined(alone[1]))

    mixed = model(*args, **kwargs, task=TASKS)
    assert type(mixed) is type(alone[0])
    for i, task in enumerate(TASKS.tolist()):
        for ours, theirs in zip(parts(mixed), parts(alone[task]), strict=True):
            assert_close(ours[i], theirs[i], "network")
    everything = model.forward_all_tasks(*args, **kwargs)
    assert type(everything) is type(alone[0])
    for task in range(3):
        for ours, theirs in zip(parts(everything), parts(alone[task]), strict=True):
            assert_close(ours[task], theirs, "network")
    with pytest.raises(InputError, match="say where its logits are"):
        model.infer_task(*args, **kwargs)
    found = model.infer_task(*args, **kwargs, select=lambda y: parts(y)[1])
    logits = torch.stack([parts(y)[1] for y in alone])
    assert torch.equal(found, hmf.functional.entropy_select(logits))
    with model.use_task(1):
        assert torch.equal(joined(model.net(*args, **kwargs)), joined(alone[1]))


def test_inputs_by_name_only():
    model, x = model_of(HeadFirst()), batch()
    expected = model(x, 1)
    assert torch.equal(model(x=x, task=1), expected)
    assert_close(model(x=x, task=TASKS)[2], expected[2], "network")
    assert_close(model.forward_all_tasks(x=x)[1], expected, "network")
    assert torch.equal(model.infer_task(x=x), model.infer_task(x))
    with pytest.raises(InputError, match="which task"):
        model(x=x)


def test_outputs_without_a_row_per_sample_are_refused_for_mixed_tasks():
    model = model_of(TwoHeads(lambda a, b: (a, b.mean())))
    with pytest.raises(InputError, match="without a row per sample it needs one task per batch"):
        model(batch(), TASKS)


def test_attributes_of_the_network_are_reached_through_the_model():
    net = HeadFirst()
    net.config = {"classes": 3}
    model = model_of(net)
    assert model.config is net.config and model.head is net.head
    with pytest.raises(AttributeError, match="absent"):
        _ = model.absent


class Generator(nn.Module):
    """What generates calls the network many times, through itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)).relu())

    def generate(self, ids: Tensor, steps: int) -> Tensor:
        for _ in range(steps):
            ids = torch.cat([ids, self(ids)[:, -1:].argmax(-1)], 1)
        return ids


def test_generate_under_use_task():
    net = Generator()
    model = model_of(net)
    ids = torch.randint(12, (2, 3))
    with pytest.raises(InputError, match="on its own has no mask"):
        model.generate(ids, 2)
    with torch.no_grad(), model.use_task(2):
        found = model.generate(ids, 6)
    assert torch.equal(found, model.export(2).generate(ids, 6))


def test_the_network_on_its_own_is_refused():
    model, x = blob_model().eval(), torch.randn(4, 8)
    for call in (lambda: model.net(x), lambda: model.net.forward(x)):
        with pytest.raises(InputError, match="called outside of a forward pass|on its own has no mask"):
            call()
    with model.disabled():
        model.net(x)
    with model.use_task(0):
        assert torch.equal(model.net(x), model(x, 0))


def test_a_network_that_fails_leaves_no_mask_behind():
    model = model_of(perceptron())
    with pytest.raises(RuntimeError):
        model.net[0].register_forward_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))
        model(batch(), 1)
    with pytest.raises(InputError, match="on its own has no mask"):
        model.net(batch())
    assert model.net[0].weight is model.net[0]._parameters["weight"]


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["whole", "in place", "a part"])
def test_a_network_compiled_before_it_is_wrapped(how):
    """Its output layer is found as without, and its masks are not compiled into it."""
    torch.compiler.reset()
    net = HeadFirst()
    net.body = nn.Sequential(net.body, nn.BatchNorm1d(8))
    plain = copy.deepcopy(net)
    if how == "whole":
        net = torch.compile(net, backend="aot_eager")
    elif how == "in place":
        net.compile(backend="aot_eager")
    else:
        net.body.compile(backend="aot_eager")
    model, expected = model_of(net), model_of(plain)
    expected.hypernet.load_state_dict(model.hypernet.state_dict())
    with torch.no_grad():
        for task in range(3):
            if task == 2:  # by then it is compiled, for the first pass and for all others
                counters.clear()
            assert_close(model(batch(), task), expected(batch(), task), "network")
        assert counters["stats"]["unique_graphs"] == 0, "another task is compiled anew"
        assert_close(model(batch(), TASKS), expected(batch(), TASKS), "network")
    unselected = [
        [segment.name.removeprefix("_orig_mod.") for segment in m.layout.segments if not segment.selected]
        for m in (model, expected)
    ]
    assert unselected == [["head.bias"]] * 2
    grads = [torch.autograd.grad(m(batch(), 1).square().sum(), m.weights()) for m in (model, expected)]
    for ours, theirs in zip(*grads, strict=True):
        assert_close(ours, theirs, "network")


class Breaks(HeadFirst):
    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        torch._dynamo.graph_break()
        return self.head(h.relu())


def test_a_compiled_graph_that_breaks_within_a_pass_keeps_the_mask():
    torch.compiler.reset()
    model = model_of(Breaks(), heads="head")
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for task in range(3):
            assert_close(compiled(batch(), torch.tensor(task)), model(batch(), task), "network")
