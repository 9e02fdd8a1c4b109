"""Exported files, each loaded without this library and run: the model's outputs, for batches of other sizes too."""

import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.modules import Checkpointed, HeadFirst, Recurrent, TwoHeads, as_pair, encoder_layer
from support.networks import TiedHead, small_convnet
from support.tolerances import assert_close
from torch import Tensor, nn

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
    with pytest.raises(InputError, match="OfOneSize makes a constant of 2, the size of the first dimension") as caught:
        model.export(TASK, "pt2", tmp_path / "net.pt2", X)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    model.export(TASK, "pt2", tmp_path / "net.pt2", X, dynamic=False)


class Named(nn.Module):
    """Takes what it adds up by any name, beside the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 2)

    def forward(self, x: Tensor, **others: Tensor) -> Tensor:
        return self.layer(x - 2 * sum(others.values(), torch.zeros(())))


def test_inputs_that_only_the_caller_names(tmp_path):
    model, x = model_of(Named()).eval(), torch.randn(2, 16)
    model(x, task=TASK, scale=x)
    with pytest.raises(InputError, match=r"Named.forward takes scale in \*\*others, .*: dynamic=False writes a file"):
        model.export(TASK, "pt2", tmp_path / "net.pt2", x, {"scale": x})
    path = model.export(TASK, "pt2", tmp_path / "net.pt2", x, {"scale": x}, dynamic=False)
    # The example's inputs were one and the same tensor; these are not.
    assert_close(torch.export.load(path).module()(x, scale=-x), model(x, task=TASK, scale=-x), "network")
