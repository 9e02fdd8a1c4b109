"""Models in a folder: save_pretrained and from_pretrained."""

import json

import pytest
import torch
from safetensors import safe_open
from support.networks import TiedDecoder, blob_model, small_convnet
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError, files, pretrained

DENSE = hmf.HypernetConfig(6, (8,))


def images(n=6):
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(3))


def tokens():
    return torch.tensor([[1, 2], [8, 0]])


def stirred(model):
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


SETTINGS = {
    "plain": (small_convnet, images, {}),
    "official": (small_convnet, images, {"fidelity": "official"}),
    "per task": (small_convnet, images, {"per_task": ["norm", "5.*"]}),
    "chosen": (
        small_convnet,
        images,
        {"include": [nn.Conv2d, lambda name, p: name == "5.weight"], "exclude": "3.bias"},
    ),
    "heads": (small_convnet, images, {"heads": "3"}),
    "classes": (small_convnet, images, {"classes": [5, 2, 3]}),
    "chunks": (small_convnet, images, {"hypernetwork": hmf.HypernetConfig(6, (8, 9), 40, 3)}),
    "by tensor": (small_convnet, images, {"hypernetwork": hmf.HypernetConfig(6, (8, 9), 40, 3, by_tensor=True)}),
    "drifts": (small_convnet, images, {"beta": 1, "lam": 0.1 + 0.2, "drift_norm": 2, "drift_masked": False}),
    "tied": (TiedDecoder, tokens, {}),
    "tied, per task": (TiedDecoder, tokens, {"per_task": ["decoder.*", "norm"]}),
    "own parameter": (lambda: Shared(), images, {"include": "scale"}),
}


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("case", SETTINGS)
def test_saved_and_back(case, tmp_path):
    make, inputs, settings = SETTINGS[case]
    torch.manual_seed(0)
    model = hmf.HyperMask(make(), 3, 33.5, **{"hypernetwork": DENSE, **settings})
    with torch.no_grad():
        for task in (0, 1):
            model(inputs(), task)
    model = stirred(model)
    model.begin_task(2)
    stirred(model)
    model.save_pretrained(tmp_path / "a" / "model")
    again = hmf.HyperMask.from_pretrained(tmp_path / "a" / "model", make()).eval()
    for task in range(3):
        assert torch.equal(again(inputs(), task), model(inputs(), task))
        torch.testing.assert_close(again.export(task)(inputs()), model.export(task)(inputs()))
    assert torch.equal(again.regularizer(2), model.regularizer(2)) and model.regularizer(2) > 0
    assert (again.drift, again.hypernetwork, again.sparsity) == (model.drift, model.hypernetwork, model.sparsity)
    assert (again.layout, str(again.layout).count("per task")) == (model.layout, str(model.layout).count("per task"))
    assert again.classes == model.classes and again.num_tasks == 3
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_the_life_of_tasks_goes_with_it(tmp_path):
    model = blob_model(3, per_task="norm")
    model.add_task(like=1)
    model.remove_task(0)
    model.freeze_task(2)
    nn.init.constant_(model.net[1]._buffers["plain_running_mean"], 7.0)
    model.save_pretrained(tmp_path)
    again = hmf.HyperMask.from_pretrained(tmp_path, blob_model().unconvert()).eval()
    assert again.tasks == (1, 2, 3) and again.frozen == (2,) and again.num_tasks == 4
    with again.disabled():  # the statistics that the network came with, too
        assert (again.net[1].running_mean == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtypes_are_the_files(dtype, tmp_path):
    model = hmf.HyperMask(small_convnet().to(dtype), 2, 30, DENSE).eval()
    model.save_pretrained(tmp_path)
    again = hmf.HyperMask.from_pretrained(tmp_path, small_convnet()).eval()
    assert {p.dtype for p in again.net.parameters()} == {dtype}
    assert again.hypernet.output.weight.dtype == model.hypernet.output.weight.dtype
    assert torch.equal(again(images().to(dtype), 1), model(images().to(dtype), 1))


def test_tied_tensors_are_saved_once(tmp_path):
    hmf.HyperMask(TiedDecoder(), 2, hypernetwork=DENSE).save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(str(path), "pt") as file:
        names = set(file.keys())
    assert len(names & {"net.decoder.weight", "net.embedding.weight"}) == 1
    again = hmf.HyperMask.from_pretrained(tmp_path, TiedDecoder())
    assert again.net.decoder._parameters["weight"] is again.net.embedding._parameters["weight"]


def test_parts_of_one_storage(tmp_path):
    net = small_convnet()
    whole = torch.randn(10)
    net.register_buffer("a", whole[:6])
    net.register_buffer("b", whole[4:])
    model = hmf.HyperMask(net, 2, hypernetwork=DENSE)
    model.save_pretrained(tmp_path)
    other = small_convnet()
    other.register_buffer("a", torch.zeros(6))
    other.register_buffer("b", torch.zeros(6))
    again = hmf.HyperMask.from_pretrained(tmp_path, other)
    assert torch.equal(again.net.a, whole[:6]) and torch.equal(again.net.b, whole[4:])


def test_nothing_is_pickled_and_only_one_model_is_there(tmp_path):
    model = blob_model()
    model.save_pretrained(tmp_path)
    stirred(model).save_pretrained(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[0] == "hypermask.json" and names[1].startswith("model-") and len(names) == 2
    assert torch.equal(
        hmf.HyperMask.from_pretrained(tmp_path, blob_model().unconvert()).net[0].weight, model.net[0].weight
    )


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_kill_at_any_moment_leaves_a_whole_model(tmp_path, monkeypatch, step):
    old, new = blob_model(), stirred(blob_model())
    old.save_pretrained(tmp_path)
    calls = []

    def dies(change):
        def wrapper(*args, **kwargs):
            calls.append(change)
            if len(calls) == step:
                raise KeyboardInterrupt
            return change(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(pretrained, "save_file", dies(pretrained.save_file))
    monkeypatch.setattr(pretrained.os, "replace", dies(pretrained.os.replace))
    monkeypatch.setattr(files.os, "fsync", dies(files.os.fsync))
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    again = hmf.HyperMask.from_pretrained(tmp_path, blob_model().unconvert())
    assert torch.equal(again.net[0].weight, old.net[0].weight)
    new.save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def convnet_with(**changes):
    net = small_convnet()
    for number, module in changes.items():
        net[int(number.removeprefix("at"))] = module
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: convnet_with(at5=nn.Linear(54, 6)),
            r"^5.weight is \(5, 54\) in .*, and \(6, 54\) in the network given$",
        ),
        (lambda: convnet_with(at3=nn.Identity()), "^3.weight is not a parameter of the network given"),
        (lambda: convnet_with(at2=nn.Linear(3, 3)), "^2.weight is not a parameter of the network in "),
        (lambda: convnet_with(at1=nn.Identity()), "^1.weight is not a parameter of the network given"),
        (
            lambda: convnet_with(at1=nn.BatchNorm2d(4, track_running_stats=False)),
            "^net.1.* is not in the model",
        ),
        (lambda: hmf.HyperMask(small_convnet(), 1).net, "is a HyperMask model's already"),
        (lambda: "net", "the target network must be an nn.Module, not 'net'"),
    ],
)
def test_another_network_is_refused_by_its_first_difference(make, message, tmp_path):
    hmf.HyperMask(small_convnet(), 2, hypernetwork=DENSE).save_pretrained(tmp_path)
    net = make()
    types = [type(m) for m in net.modules()] if isinstance(net, nn.Module) else []
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()} if types else {}
    with pytest.raises(InputError, match=message) as caught:
        hmf.HyperMask.from_pretrained(tmp_path, net)
    assert "\n" not in str(caught.value)
    if types:  # left as it was
        assert [type(m) for m in net.modules()] == types
        assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in state.items())


def test_a_tied_model_for_an_untied_network(tmp_path):
    hmf.HyperMask(TiedDecoder(), 2, hypernetwork=DENSE).save_pretrained(tmp_path)
    net = TiedDecoder()
    net.decoder.weight = nn.Parameter(torch.randn(9, 6))
    with pytest.raises(InputError, match="embedding.weight is not a parameter of the network in"):
        hmf.HyperMask.from_pretrained(tmp_path, net)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "hypermask.json").unlink(), "^no model in .*: hypermask.json is missing$"),
        (lambda d: next(d.glob("*.safetensors")).unlink(), "hypermask.json names model-.*, which is missing"),
        (lambda d: cut(next(d.glob("*.safetensors"))), "is cut off or was altered"),
        (lambda d: cut(d / "hypermask.json"), "is cut off or was altered"),
        (lambda d: change(d, "format", 2), "is not a model of format 1"),
        (lambda d: change(d, "file", "../x"), "the file that it names is no model's"),
        (lambda d: change(d, "sparsity", 31), "the state is of a model of 20 % sparsity, this one has 31 %"),
        (lambda d: change(d, "num_tasks", 4), "hypernet.embeddings.3 is not in"),
        (lambda d: change(d, "hypernetwork", {"embedding": 8, "width": 1}), "width: not a setting"),
        (lambda d: change(d, "parameters", [1]), "was altered"),
        (lambda d: change(d, "hypernetwork", {"embedding": 9, "hidden": [12]}), "size mismatch"),
    ],
)
def test_a_damaged_folder(damage, message, tmp_path):
    blob_model(3).save_pretrained(tmp_path)
    damage(tmp_path)
    net = blob_model(1).unconvert()
    with pytest.raises(InputError, match=message) as caught:
        hmf.HyperMask.from_pretrained(tmp_path, net)
    assert "\n" not in str(caught.value) and type(net[0]) is nn.Linear


def test_a_refused_folder_leaves_the_dtypes_of_the_network(tmp_path):
    model = blob_model(3)
    model.net.bfloat16()
    model.save_pretrained(tmp_path)
    change(tmp_path, "sparsity", 31)
    net = blob_model(1).unconvert()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(InputError, match="this one has 31 %"):
        hmf.HyperMask.from_pretrained(tmp_path, net)
    for name, tensor in net.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name


def change(folder, key, value):
    path = folder / "hypermask.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, key: value}))


def test_a_folder_that_cant_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        blob_model().save_pretrained(tmp_path / "file")
