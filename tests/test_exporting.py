"""Exported files, each loaded without this library and run: the model's outputs, for batches of other sizes too."""

import sys
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.modules import Checkpointed, HeadFirst, Recurrent, TwoHeads, as_pair, encoder_layer
from support.networks import TiedHead, small_convnet
from support.tolerances import assert_close
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import hypermask_fast as hmf
from hypermask_fast import InputError, exporting

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
TASK = 1
NETWORKS = {
    "convnet": (small_convnet, lambda count: torch.randn(count, 2, 8, 8)),
    "tied": (TiedHead, lambda count: torch.randint(20, (count, 5))),
    "LSTM": (lambda: Recurrent(nn.LSTM), lambda count: torch.randint(20, (count, 9))),
    "transformer": (encoder_layer, lambda count: torch.randn(count, 7, 16)),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def model_of(net: nn.Module) -> hmf.HyperMask:
    torch.manual_seed(0)
    return hmf.HyperMask(net, 3, 30, hmf.HypernetConfig(embedding=6, hidden=(8,)))


def by_onnxruntime(path, *inputs: Tensor) -> list[Tensor]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    named = {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, named)]


@each_network
def test_safetensors(name, tmp_path):
    build, batch = NETWORKS[name]
    model, x = model_of(build()), batch(4)
    expected = model.eval()(x, TASK)
    path = tmp_path / "net.safetensors"
    assert model.export(TASK, "safetensors", path) == path
    net = build().eval()
    net.load_state_dict(load_file(path))
    assert_close(net(x), expected, "network")


@each_network
def test_pt2(name, tmp_path):
    build, batch = NETWORKS[name]
    model = model_of(build())
    model.eval()(batch(2), TASK)
    path = model.export(TASK, "pt2", tmp_path / "net.pt2", batch(2))
    program = torch.export.load(path).module()
    for count in (2, 5):
        x = batch(count)
        assert_close(program(x), model(x, TASK), "network")


@each_network
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    build, batch = NETWORKS[name]
    model = model_of(build())
    model.eval()(batch(2), TASK)
    path = model.export(TASK, "onnx", tmp_path / "net.onnx", (batch(2),))
    for count in (2, 5):
        x = batch(count)
        (y,) = by_onnxruntime(path, x)
        assert_close(y, model(x, TASK), "network")


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_several_inputs_by_name_and_several_outputs(format, tmp_path):
    model = model_of(TwoHeads(as_pair)).eval()
    x, scale = torch.randn(3, 16), torch.rand(3, 1)
    expected = model(x, scale, task=TASK)
    if format == "onnx":
        pytest.importorskip("onnxscript")
    path = model.export(TASK, format, tmp_path / "net", x, {"scale": scale})
    found = torch.export.load(path).module()(x, scale=scale) if format == "pt2" else by_onnxruntime(path, x, scale)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, "network")


def test_a_file_of_one_size(tmp_path):
    model, x = model_of(small_convnet()).eval(), torch.randn(1, 2, 8, 8)
    path = model.export(TASK, "pt2", tmp_path / "net.pt2", x, dynamic=False)
    program = torch.export.load(path).module()
    assert_close(program(x), model(x, TASK), "network")
    with pytest.raises(AssertionError):
        program(x.repeat(2, 1, 1, 1))


def test_the_model_stays_as_it_is(tmp_path):
    model, x = model_of(small_convnet()).train(), torch.randn(4, 2, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.export(TASK, "pt2", tmp_path / "net.pt2", x)
    assert model.training and all(module.training for module in model.net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_metadata(tmp_path):
    net, noted, x = small_convnet(), {"task": "1"}, torch.randn(2, 2, 8, 8)
    paths = {
        format: exporting.write(net, format, tmp_path / format, x, metadata=noted) for format in ("safetensors", "pt2")
    }
    with safe_open(str(paths["safetensors"]), framework="pt") as file:
        assert file.metadata() == {"format": "pt", "task": "1"}
    extra = {"task": ""}
    torch.export.load(paths["pt2"], extra_files=extra)
    assert extra == noted
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = onnx.load(exporting.write(net, "onnx", tmp_path / "onnx", x, metadata=noted))
    assert {entry.key: entry.value for entry in model.metadata_props} == noted


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x if x.sum() > 0 else -x)


X = torch.zeros(2, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "tflite"}, "format is one of module, safetensors, pt2, onnx, not 'tflite'"),
        ({"format": "module", "path": "net"}, "format='module' takes no path"),
        ({"format": "pt2", "path": 5, "inputs": X}, "path is that of the file to write, not 5"),
        ({"format": "pt2", "path": "net", "inputs": X, "kwargs": [1]}, "kwargs are inputs by name, .* not list"),
        ({"format": "safetensors"}, "format='safetensors' needs the path of the file to write"),
        ({"format": "pt2", "path": "net"}, r"give inputs=\(x,\), an example"),
        ({"format": "pt2", "path": "net", "inputs": X[:1]}, "two samples or more"),
        ({"format": "pt2", "path": "none/net", "inputs": X}, "cannot write none/net: No such file or directory"),
        ({"format": "safetensors", "path": ""}, r"'\.' names no file: give the path of the file to write"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = model_of(HeadFirst())
    model(X, 0)
    with pytest.raises(InputError, match=message) as caught:
        model.export(TASK, **arguments)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_network_that_can_t_be_exported(tmp_path):
    model = model_of(LooksAtValues())
    model(X, 0)
    with pytest.raises(InputError, match="PyTorch can't export LooksAtValues as pt2: ") as caught:
        model.export(TASK, "pt2", tmp_path / "net.pt2", X)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_checkpointed_network_is_exported(tmp_path):
    model = hmf.HyperMask(Checkpointed(False), 2, heads="out").eval()
    path = model.export(TASK, "pt2", tmp_path / "net.pt2", torch.randn(2, 7, 16))
    x = torch.randn(3, 7, 16)
    assert_close(torch.export.load(path).module()(x), model(x, TASK), "network")


def test_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    model = model_of(small_convnet())
    with pytest.raises(InputError, match=r'exporting to ONNX needs onnx: pip install "hypermask-fast\[onnx\]"'):
        model.export(TASK, "onnx", tmp_path / "net.onnx", torch.randn(2, 2, 8, 8))


class OfOneSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(len(x), -1))


def test_a_network_that_fixes_the_batch_s_size(tmp_path):
    model = model_of(OfOneSize())
    model(X, 0)
    with pytest.raises(InputError, match="OfOneSize makes a constant of x's first dimension, 2, ") as caught:
        model.export(TASK, "pt2", tmp_path / "net.pt2", X)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    model.export(TASK, "pt2", tmp_path / "net.pt2", X, dynamic=False)


class Anyhow(nn.Module):
    """A network that takes its inputs in the way that a test asks for."""

    def __init__(self, takes) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.takes = takes

    def run(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class ByName(Anyhow):
    def forward(self, **kwargs: Tensor) -> Tensor:
        return self.takes(self, **kwargs)


class MoreByName(Anyhow):
    def forward(self, x: Tensor, /, scale: Tensor | None = None, **kwargs: Tensor) -> Tensor:
        return self.takes(self, x, scale, **kwargs)


class InOrder(Anyhow):
    def forward(self, *args: object) -> Tensor:
        return self.takes(self, *args)


WAYS = {
    "names alone": (ByName, lambda n, x, scale: n.run(x) * scale, lambda r: ((), {"x": r(4), "scale": r(1)})),
    "more names": (
        MoreByName,
        lambda n, x, scale, kwargs: n.run(x) * scale + kwargs,
        lambda r: ((r(4),), {"kwargs": r(1), "scale": r(1)}),
    ),
    "no optional": (MoreByName, lambda n, x, scale, c: n.run(x) + c, lambda r: ((r(4), None), {"c": r(2)})),
    "in order": (InOrder, lambda n, x, scale: n.run(x) * scale, lambda r: ((r(4), r(1)), {})),
    "a dict": (InOrder, lambda n, d: n.run(d["x"]) * d["more"][0], lambda r: (({"x": r(4), "more": (r(1),)},), {})),
    "a number": (InOrder, lambda n, x, times: n.run(x) * times, lambda r: ((r(4), 3), {})),
    "a scalar first": (InOrder, lambda n, scale, x: n.run(x) * scale, lambda r: ((torch.tensor(2.0), r(4)), {})),
    "integers": (InOrder, lambda n, ids, x: n.run(x) * ids.float(), lambda r: ((r(1).round().long(), r(4)), {})),
    "two batches": (InOrder, lambda n, x, q: n.run(x) @ n.run(q).T, lambda r: ((r(4), r(4)[1:]), {})),
    "a table first": (InOrder, lambda n, table, x: n.run(x) @ n.run(table).T, lambda r: ((r(4)[:2], r(4)), {})),
}


@pytest.mark.parametrize("format", ["pt2", "onnx"])
@pytest.mark.parametrize("way", WAYS)
def test_any_way_to_take_inputs_is_exported_with_the_batch_open(way, format, tmp_path):
    kind, takes, inputs = WAYS[way]
    if format == "onnx":
        pytest.importorskip("onnxscript")
    model = hmf.HyperMask(kind(takes), 2, 30, heads="last").eval()
    args, kwargs = inputs(lambda width: torch.randn(3, width))
    path = model.export(TASK, format, tmp_path / "net", args, kwargs)
    for count in (3, 5):
        args, kwargs = inputs(lambda width, count=count: torch.randn(count, width))
        if format == "pt2":
            found = torch.export.load(path).module()(*args, **kwargs)
        else:
            (found,) = by_onnxruntime(path, *(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)))
        assert_close(found, model(*args, task=TASK, **kwargs), "network")


def test_the_networks_own_forward_is_back_after_an_export(tmp_path):
    net = ByName(WAYS["names alone"][1])
    own = vars(net)["forward"] = partial(ByName.forward, net)
    exporting.write(net, "pt2", tmp_path / "net", (), {"x": torch.randn(3, 4), "scale": torch.rand(3, 1)})
    assert vars(net)["forward"] is own


def test_what_is_no_batch_is_named(tmp_path):
    model = hmf.HyperMask(InOrder(lambda n, x: n.run(x.T)), 2, 30, heads="last").eval()
    line = r"InOrder makes a constant of args_0's first dimension, 4, .*: put the batch first"
    with pytest.raises(InputError, match=line) as caught:
        model.export(TASK, "pt2", tmp_path / "net", torch.randn(4, 3))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_one_tensor_in_two_places_of_the_example_is_two_inputs(tmp_path):
    model = hmf.HyperMask(InOrder(lambda n, x, y: n.run(x) - 2 * n.run(y)), 2, 30, heads="last").eval()
    x = torch.randn(3, 4)
    program = torch.export.load(model.export(TASK, "pt2", tmp_path / "net", (x, x))).module()
    assert_close(program(x, -x), model(x, -x, TASK), "network")
