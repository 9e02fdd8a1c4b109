"""Tasks packed into one file, and run from it without a hypernetwork."""

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from support.networks import TiedDecoder, small_convnet
from torch import nn

import hypermask_fast as hmf
from hypermask_fast.errors import InputError
from hypermask_fast.inference import Packed, PackedModel, load_packed
from hypermask_fast.training.targets import TargetConfig, build_target

TESTS = Path(__file__).parents[1]
DENSE = hmf.HypernetConfig(6, (8,))


def images(n=6):
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(3))


def tokens():
    return torch.tensor([[1, 2], [8, 0], [3, 3]])


SETTINGS = {
    "plain": (small_convnet, images, {}),
    "nothing dropped": (small_convnet, images, {"sparsity": 0.0}),
    "official": (small_convnet, images, {"fidelity": "official"}),
    "per task": (small_convnet, images, {"per_task": ["norm", "5.*"]}),
    "chosen": (small_convnet, images, {"include": [nn.Conv2d], "exclude": "3.bias"}),
    "classes": (small_convnet, images, {"classes": [5, 2, 3]}),
    "tied": (TiedDecoder, tokens, {"heads": "decoder"}),
    "chunks": (small_convnet, images, {"hypernetwork": hmf.HypernetConfig(6, (8, 9), 40, 3)}),
}


def model_of(name="plain"):
    """A model whose parameters and statistics differ from those that a fresh network has."""
    net, inputs, how = SETTINGS[name]
    torch.manual_seed(1)
    model = hmf.HyperMask(net(), 3, **{"sparsity": 30.0, "hypernetwork": DENSE, **how})
    with torch.no_grad():
        for task in range(3):
            model.train()(inputs(), task)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def written(model, path, **how):
    file = path / "tasks.safetensors"
    model.pack(**how).save(file)
    return file


# -- what it gives ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", SETTINGS)
def test_float32_gives_the_models_own_outputs(name, tmp_path):
    model, (net, inputs, _) = model_of(name), SETTINGS[name]
    torch.manual_seed(5)  # whatever the network was before
    packed = load_packed(written(model, tmp_path), net())
    assert isinstance(packed, PackedModel) and not hasattr(packed, "hypernet")
    x = inputs()
    for task in range(3):
        assert torch.equal(packed(x, task), model(x, model.mask(task)))
    torch.testing.assert_close(packed.forward_all_tasks(x), model.forward_all_tasks(x))
    if name != "official":
        ids = torch.arange(len(x)) % 3
        torch.testing.assert_close(packed(x, ids), model(x, ids))
    assert torch.equal(packed(x, torch.tensor(1)), packed(x, task=1))


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "within"), [("bfloat16", 1e-2), ("int8", 1e-2)])
@pytest.mark.parametrize("name", ["plain", "nothing dropped", "per task", "tied"])
def test_rounded_masks_give_outputs_that_are_close(name, dtype, within, tmp_path):
    model, (net, inputs, _) = model_of(name), SETTINGS[name]
    packed, x = load_packed(written(model, tmp_path, dtype=dtype), net()), inputs()
    for task in range(3):
        expected = model(x, task)
        assert (packed(x, task) - expected).norm() <= within * expected.norm()


@torch.no_grad()
def test_some_tasks_keep_their_ids(tmp_path):
    model, x = model_of("per task"), images()
    packed = load_packed(written(model, tmp_path, tasks=[2, 0]), small_convnet())
    assert packed.tasks == (2, 0)
    for task in (0, 2):
        assert torch.equal(packed(x, task), model(x, model.mask(task)))
    torch.testing.assert_close(packed.forward_all_tasks(x), torch.stack([model(x, 2), model(x, 0)]))
    with pytest.raises(InputError, match="task 1 is not packed here: there are 2, 0"):
        packed(x, 1)
    with pytest.raises(InputError, match="task 1 is not packed here"):
        packed(x, torch.tensor([0, 1, 2, 0, 1, 2]))


def test_unpacked_masks_are_those_that_were_packed():
    model = model_of()
    masks = model.mask(1).masks()
    exact, rounded, steps = (model.pack([1], dtype).unpack(1) for dtype in ("float32", "bfloat16", "int8"))
    assert list(exact) == [segment.name for segment in model.layout.segments if segment.selected]
    for name, mask in exact.items():
        assert torch.equal(mask, masks[name])
        assert torch.equal(rounded[name], mask.bfloat16().float())
        assert torch.all(steps[name][mask == 0] == 0)
        assert (steps[name] - mask).abs().max() <= mask.max() / 255 / 2 * 1.001


def test_a_packed_model_is_no_longer_changed_by_its_origin():
    model, x = model_of(), images()
    packed = PackedModel(model.pack(), small_convnet())
    before = packed(x, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(packed(x, 0), before)


@torch.no_grad()
def test_w_m_is_kept_within_a_limit_and_made_again_for_other_weights(tmp_path):
    model, x = model_of(), images()
    file = written(model, tmp_path)
    needed = sum(t.nbytes for t in model.pack().weights().values())
    packed = load_packed(file, small_convnet(), 2 * needed)
    for task in (0, 0, 1, 2, 2):
        packed(x, task)
    assert (packed.cache.hits, packed.cache.made, packed.cache.tasks) == (2, 3, (1, 2))
    next(packed.net.parameters()).mul_(2.0)
    model.net[0].weight.mul_(2.0)
    assert torch.equal(packed(x, 2), model(x, model.mask(2)))


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "value", "weight"), [("float32", 4, 4), ("bfloat16", 2, 2), ("int8", 1, 2)])
def test_sizes_are_told_as_they_are(dtype, value, weight, tmp_path):
    model = model_of()
    packed = model.pack(dtype=dtype)
    applied = [segment for segment in model.layout.segments if segment.selected]
    entries = sum(segment.size for segment in applied)
    kept = sum(int((model.mask(task).masks()[segment.name] != 0).sum()) for task in range(3) for segment in applied)
    scales = 3 * 4 * len(applied) * (dtype == "int8")
    sizes = packed.sizes()
    assert sizes["values"] == value * kept + scales
    assert sizes["bitmaps"] == 3 * -(-entries // 8)
    assert sizes["weights"] == weight * entries
    assert sum(sizes.values()) == packed.nbytes
    file = tmp_path / "packed.safetensors"
    packed.save(file)
    assert packed.nbytes < file.stat().st_size < packed.nbytes + 8000
    assert str(packed).startswith(f"3 tasks packed in {dtype}: {packed.nbytes:,} bytes")


def test_where_nothing_is_dropped_there_is_no_bitmap():
    assert model_of("nothing dropped").pack().sizes()["bitmaps"] == 0


def test_ten_tasks_of_resnet20_in_25_megabytes():
    """N = 1,067,530 entries and sparsity 0: 2 bytes a mask entry, and 2 bytes a weight once."""
    torch.manual_seed(0)  # of ten million logits one can be exactly 0, and an entry that is not kept
    net = build_target(TargetConfig("resnet20", width=32), (3, 32, 32), 10)
    model = hmf.HyperMask(net, 10, 0.0, hmf.HypernetConfig(embedding=4, hidden=(4,))).eval()
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32), 0)
    packed = model.pack(dtype="bfloat16")
    assert packed.nbytes <= 25_000_000
    assert packed.sizes()["values"] == 2 * 10 * (model.layout.size - 10)


# -- without the rest -------------------------------------------------------------------------------------------------


def test_another_process_runs_it_from_two_threads(tmp_path):
    model, x = model_of(), images()
    file = written(model, tmp_path)
    torch.save({"x": x, "y": [model(x, model.mask(task)).detach() for task in range(3)]}, tmp_path / "expected.pt")
    program = f"""
        import threading, torch
        from torch import nn
        from support.networks import small_convnet
        from hypermask_fast.inference import load_packed
        expected = torch.load({str(tmp_path / "expected.pt")!r})
        model = load_packed({str(file)!r}, small_convnet())
        wrong = []
        def serve(task):
            for _ in range(5):
                if not torch.equal(model(expected["x"], task), expected["y"][task]):
                    wrong.append(task)
        threads = [threading.Thread(target=serve, args=(task,)) for task in (0, 2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(wrong)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
    )
    assert done.stdout == "[]\n", done.stderr


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"tasks": [0, 3]}, "task 3 does not exist"),
        ({"tasks": []}, "no task to pack"),
        ({"tasks": [1, 1]}, "each task is packed once: 1, 1"),
        ({"dtype": "float16"}, "mask values are packed in float32, bfloat16, int8, not 'float16'"),
        ({"dtype": torch.bfloat16}, "mask values are packed in float32, bfloat16, int8, not torch.bfloat16"),
    ],
)
def test_what_can_not_be_packed_is_refused(how, said):
    with pytest.raises(InputError, match=said):
        model_of().pack(**how)


def test_masks_that_are_not_finite_and_unknown_heads_are_refused():
    model = model_of()
    with torch.no_grad():
        model.hypernet.embeddings[1][0] = float("nan")
    with pytest.raises(InputError, match="the mask of task 1 is not finite"):
        model.pack()
    fresh = hmf.HyperMask(TiedDecoder(), 2, 0.0, DENSE)
    with pytest.raises(InputError, match="run one batch before pack"):
        fresh.pack()


def other_width():
    net = small_convnet()
    net[5] = nn.Linear(net[5].in_features, 7)
    return net


def without_norm():
    net = small_convnet()
    net[1] = nn.Identity()
    return net


def untracked():
    net = small_convnet()
    net[1] = nn.BatchNorm2d(net[1].num_features, track_running_stats=False)
    return net


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (other_width, "5.weight is (5, "),
        (without_norm, "1.weight is not a parameter of the network given: it is another network"),
        (untracked, "1.num_batches_tracked is not in the network given: it is another network"),
        (lambda: "net", "must be an nn.Module, not str"),
    ],
)
def test_another_network_is_refused_and_left_as_it_was(net, said, tmp_path):
    file, other = written(model_of(), tmp_path), net()
    state = {name: t.clone() for name, t in other.state_dict().items()} if isinstance(other, nn.Module) else {}
    with pytest.raises(InputError) as refused:
        load_packed(file, other)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    for name, tensor in state.items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert not any("mask_scope" in vars(m) for m in other.modules()) if state else True


def test_files_that_are_none_are_refused(tmp_path):
    file = written(model_of(), tmp_path)
    whole = file.read_bytes()

    def refused(path):
        with pytest.raises(InputError) as error:
            load_packed(path, small_convnet())
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "cannot read" in refused(tmp_path / "missing.safetensors") or "No such file" in refused(
        tmp_path / "missing.safetensors"
    )
    assert "cannot read" in refused(tmp_path) or "is not a file of packed tasks" in refused(tmp_path)
    for length in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "is not a file of packed tasks, or is damaged" in refused(file)
    for place in (len(whole) - 1, len(whole) - len(whole) // 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert "is damaged" in refused(file)
    save_file({"a": torch.zeros(2)}, file)
    assert "holds no packed tasks" in refused(file)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 9}, "is of format 9, this version reads 1"),
        ({"dtype": "int4"}, "values in int4"),
        ({"tasks": [0, 1, 2, 3]}, "masks.3.values"),
        ({"parameters": [{"name": "x"}]}, "'kind'"),
        ({"parameters": 3}, "damaged"),
        ({"tasks": None}, "damaged"),
    ],
)
def test_metadata_that_was_altered_is_refused(change, said, tmp_path):
    file = written(model_of(), tmp_path)
    with safe_open(file, "pt") as opened:
        described = json.loads(opened.metadata()["hypermask_packed"])
    save_file(load_file(file), file, {"hypermask_packed": json.dumps(described | change)})
    with pytest.raises(InputError, match=said) as error:
        Packed.load(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (torch.tensor(1.7), "a task tensor is int64, 0-dim or one id per sample, not torch.float32 of ()"),
        (torch.tensor(True), "not torch.bool of ()"),
        (torch.tensor([[1]]), r"not torch.int64 of \(1, 1\)"),
        (torch.zeros(2, 2), r"not torch.float32 of \(2, 2\)"),
        (torch.tensor([0, 1]), r"one task per sample is an int64 tensor \(6,\), not torch.int64 of \(2,\)"),
        (1.0, "task 1.0 is not packed here: there are 0, 1, 2"),
        (True, "task True is not packed here"),
    ],
)
def test_what_is_no_task_is_refused(task, said):
    packed = PackedModel(model_of().pack(), small_convnet())
    with pytest.raises(InputError, match=said):
        packed(images(), task)
    if not isinstance(task, torch.Tensor):
        with pytest.raises(InputError, match=said):
            packed.packed.unpack(task)


def test_an_empty_batch_has_an_empty_output():
    model, none = model_of(), images()[:0]
    packed, ids = PackedModel(model.pack(), small_convnet()), torch.zeros(0, dtype=torch.int64)
    assert packed(none, ids).shape == packed(none, 1).shape == model.eval()(none, ids).shape == (0, 5)


def test_a_cache_too_small_for_one_task_and_training_are_refused(tmp_path):
    model = model_of()
    file, net = written(model, tmp_path), small_convnet()
    with pytest.raises(InputError, match="cache_bytes=10 is too small for one task"):
        load_packed(file, net, 10)
    with pytest.raises(InputError, match="packed tasks are for evaluation"):
        load_packed(file, net).train()


def test_a_folder_that_is_not_there_is_said(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        model_of().pack().save(tmp_path / "none" / "tasks.safetensors")


@torch.no_grad()
def test_threads_that_share_a_packed_model(tmp_path):
    packed, x = load_packed(written(model_of(), tmp_path), small_convnet()), images()
    expected = [packed(x, task) for task in range(3)]
    packed.cache_bytes = 0
    wrong = []

    def serve(task):
        with torch.no_grad():
            wrong.extend(task for _ in range(5) if not torch.equal(packed(x, task), expected[task]))

    threads = [threading.Thread(target=serve, args=(task,)) for task in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
