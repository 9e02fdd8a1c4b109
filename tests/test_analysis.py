"""hmf.analysis: counts by hand and by a float64 recipe, records of learned tasks and drift, pictures, refusals."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from support.analysed import SMALL, small_model, with_logits
from support.networks import convnet_model
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.analysis import masks, pictures

# -- by hand ----------------------------------------------------------------------------------------------------------


def test_hand_made_masks():
    """One weight of 8 entries, 50 percent sparsity: rank 4 of 8, so four entries are kept. (Its bias is as it is.)"""
    a = torch.tensor([[8.0, 7, 6, 5, 1, 1, 1, 1], [8.0, 7, 1, 1, 6, 5, 1, 1], [8.0, 1, 6, 1, 7, 1, 5, 1]])
    found = hmf.analysis.inspect(with_logits(torch.cat([a / 8, torch.zeros(3, 2)], 1), 50))
    assert found.tasks == (0, 1, 2) and found.whole.entries == 8 and [t.name for t in found.tensors] == ["0.weight"]
    assert found.whole.kept == (50, 50, 50)
    assert found.whole.jaccard == ((1, 2 / 6, 2 / 6), (2 / 6, 1, 2 / 6), (2 / 6, 2 / 6, 1))
    assert found.whole.used == (50, 75, 87.5) and found.whole.free == 12.5
    # Entry 0 is kept by all three; 1, 2 and 4 by two; 3, 5, 6 by one; 7 by none.
    assert found.whole.by_tasks == (12.5, 37.5, 37.5, 12.5)
    m = np.tanh(np.array([8, 7, 6, 5]) / 8)
    assert found.whole.mean_kept_value == pytest.approx([m.mean()] * 3, abs=1e-7)
    of_pair = (m[0] * m[0] + m[1] * m[1]) / (m * m).sum()  # tasks 0 and 1 share the entries of 8 and 7
    assert found.whole.cosine[0][1] == pytest.approx(of_pair, abs=1e-7)
    assert found.chance == pytest.approx(0.5 / 1.5)
    np.testing.assert_allclose(found.embeddings, np.eye(3), atol=1e-12)


def test_the_order_of_tasks_is_the_order_of_capacity():
    a = torch.tensor([[8.0, 7, 1, 1, 1, 1, 1, 1, 0, 0], [8.0, 7, 6, 5, 4, 3, 1, 1, 0, 0]])
    model = with_logits(a, 75)
    assert hmf.analysis.inspect(model, [1, 0]).tasks == (1, 0)
    model.hypernet.output.weight.data[:8, 0] = torch.tensor([1.0, 1, 1, 1, 1, 1, 7, 8])
    ahead, behind = (hmf.analysis.inspect(model, order).whole for order in ([0, 1], [1, 0]))
    assert ahead.used == behind.used == (25, 50)
    assert ahead.mean_kept_value == behind.mean_kept_value[::-1]


def test_ties_are_kept_as_the_mask_keeps_them():
    found = hmf.analysis.inspect(with_logits(torch.ones(2, 10), 50))
    assert found.whole.kept == (100, 100) and found.keeps_all


# -- against a recipe -------------------------------------------------------------------------------------------------


def recipe(model: hmf.HyperMask, tasks) -> dict[str, dict[str, np.ndarray]]:
    """Each tensor's numbers, and those of "all", written with all T x N at once in float64."""
    with torch.no_grad():
        logits = np.stack([model.mask(task).logits.double().numpy() for task in tasks])
    kept, values, borders = {}, {}, {}
    for s in model.layout.segments:
        if s.selected:
            a = np.abs(logits[:, s.start : s.stop])
            rank = math.ceil(model.sparsity * (s.size - 1) / 100)
            kept[s.name] = a >= np.sort(a, axis=1)[:, rank : rank + 1]
            values[s.name] = np.tanh(a) * kept[s.name]
            borders[s.name] = s.size
    kept["all"], values["all"] = (np.concatenate([*each.values()], axis=1) for each in (kept, values))
    found = {}
    for name in kept:
        k, m = kept[name], values[name]
        union = (k[:, None] | k[None]).sum(-1)
        norms = np.linalg.norm(m, axis=1)
        found[name] = {
            "kept": 100 * k.mean(1),
            "mean_kept_value": m.sum(1) / k.sum(1),
            "jaccard": (k[:, None] & k[None]).sum(-1) / union,
            "cosine": m @ m.T / np.outer(norms, norms),
            "used": 100 * np.logical_or.accumulate(k).mean(1),
            "by_tasks": 100 * np.bincount(k.sum(0), minlength=len(k) + 1) / k.shape[1],
        }
    return found


CHUNKED = hmf.HypernetConfig(embedding=5, hidden=(7,), chunk_size=13)


def removed_and_frozen() -> hmf.HyperMask:
    model = small_model(tasks=4)
    model.remove_task(1)
    model.freeze_task(2)
    return model


def of_bfloat16() -> hmf.HyperMask:
    return hmf.HyperMask(nn.Sequential(nn.Linear(9, 11), nn.Linear(11, 3)).bfloat16(), 3, 30, SMALL)


MODELS = {
    "dense": small_model,
    "all kept": lambda: small_model(0),
    "one kept": lambda: small_model(100),
    "chunks": lambda: small_model(hypernetwork=CHUNKED),
    "chunks by tensor": lambda: small_model(hypernetwork=dataclasses.replace(CHUNKED, by_tensor=True)),
    "one chunk": lambda: small_model(hypernetwork=dataclasses.replace(CHUNKED, chunk_size=10**6)),
    "classes": lambda: small_model(classes=[2, 3, 2]),
    "per task": lambda: small_model(per_task="2.bias"),
    "float32": lambda: small_model().float(),
    "bfloat16 network": of_bfloat16,
    "convolutions": convnet_model,
    "removed and frozen": removed_and_frozen,
    "one task": lambda: small_model(tasks=1),
}


@pytest.mark.parametrize("block", [8, 3 * 64, 2**22])
@pytest.mark.parametrize("kind", MODELS)
def test_numbers_of_every_kind_of_model(monkeypatch, kind, block):
    model = MODELS[kind]()
    monkeypatch.setattr(masks, "_BLOCK", block)
    found = hmf.analysis.inspect(model)
    assert found.tasks == model.tasks and found.sparsity == model.sparsity
    expected = recipe(model, model.tasks)
    assert [each.name for each in (*found.tensors, found.whole)] == [*expected]
    double = model.hypernet.output.weight.dtype == torch.float64
    for each in (*found.tensors, found.whole):
        for key, values in expected[each.name].items():
            exact = key not in ("mean_kept_value", "cosine")
            np.testing.assert_allclose(
                np.array(getattr(each, key)), values, rtol=1e-12 if exact or double else 1e-6, atol=1e-12, err_msg=key
            )
    e = np.stack([model.hypernet.embeddings[task].detach().double().numpy() for task in model.tasks])
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    np.testing.assert_allclose(found.embeddings, e @ e.T, atol=1e-12)


@pytest.mark.parametrize("by_tensor", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 13, 40, 10**6])
def test_a_stretch_is_a_part_of_all_logits(chunk_size, by_tensor):
    if chunk_size is None and by_tensor:
        pytest.skip("chunks alone follow tensors")
    model = small_model(hypernetwork=hmf.HypernetConfig(5, (7,), chunk_size, by_tensor=by_tensor))
    whole = model.hypernet([2, 0])
    for segment in model.layout.segments:
        for start in range(segment.start, segment.stop, 5):
            for stop in {start + 1, min(start + 30, segment.stop), segment.stop}:
                part = model.hypernet.stretch([2, 0], start, stop)
                torch.testing.assert_close(part, whole[:, start:stop], rtol=1e-12, atol=1e-12)


def test_nothing_of_the_model_changes():
    model = convnet_model().train()
    x = torch.randn(4, 2, 7, 7)
    model(x, task=0).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    records = [hmf.analysis.record(model, task, x) for task in range(3)]
    hmf.analysis.inspect(model, learned=records, inputs=dict.fromkeys(range(3), x))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and all(module.training for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert gradient is None if parameter.grad is None else torch.equal(parameter.grad, gradient)


# -- as text, JSON and pictures ---------------------------------------------------------------------------------------


def inspected(tasks: int = 3, sparsity: float = 30, drift: bool = True) -> hmf.analysis.Inspection:
    model, x = small_model(sparsity, tasks), torch.randn(6, 9).double()
    records = [hmf.analysis.record(model, task, x) for task in range(tasks)] if drift else []
    with torch.no_grad():
        for parameter in model.hypernet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return hmf.analysis.inspect(model, learned=records, inputs=dict.fromkeys(range(tasks), x))


def test_json_has_all_numbers_and_their_units():
    found = inspected()
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["whole"]["jaccard"] == [list(row) for row in found.whole.jaccard]
    assert stored["tensors"][1]["name"] == "0.bias" and stored["tensors"][1]["free"] == found.tensors[1].free
    assert stored["drift"][2]["tensors"][0]["flipped"] == found.drift[2].tensors[0].flipped
    units = " ".join(stored["units"])
    for name in ("sparsity", "embeddings", "chance", *stored["whole"], *stored["drift"][0]["whole"]):
        assert name in units or name in ("name", "entries"), name
    without = found.to_dict(pairs=False)
    assert "jaccard" not in without["tensors"][0] and "jaccard" in without["whole"]


def test_the_table_can_be_read():
    text = str(inspected())
    assert text.startswith("3 tasks, 143 masked entries, sparsity 30 %\n")
    for words in ("kept %", "free %", "flipped %", "predictions changed %", "unrelated masks: 0.5", "0.weight"):
        assert words in text, words
    assert "flipped" not in str(inspected(drift=False))
    assert "every mask keeps every entry, so the Jaccard index is 1 for all pairs" in str(inspected(sparsity=0))
    assert "Jaccard index" not in str(inspected(tasks=1))
    wide = str(inspected(tasks=12))
    assert "lowest  highest" in wide and max(map(len, wide.splitlines())) < 120, "fits a terminal"


@pytest.mark.parametrize(
    ("tasks", "sparsity", "drawn"),
    [
        (1, 30, {pictures.TENSORS, pictures.DRIFT}),
        (2, 30, {pictures.TENSORS, pictures.DRIFT, pictures.OVERLAP, pictures.CAPACITY}),
        (5, 0, {pictures.TENSORS, pictures.DRIFT, pictures.OVERLAP}),
        (13, 90, {pictures.TENSORS, pictures.DRIFT, pictures.OVERLAP, pictures.CAPACITY}),
        (40, 30, {pictures.TENSORS, pictures.DRIFT, pictures.OVERLAP, pictures.CAPACITY}),
    ],
)
def test_pictures_show_all_their_text(tasks, sparsity, drawn):
    found = inspected(tasks, sparsity)
    figures = hmf.analysis.figures(found, "a run with a rather long title, so long that it has to be wrapped somewhere")
    assert figures.keys() == drawn
    assert len(pictures.left_out(found)) == (tasks == 1 or sparsity == 0)
    for name, figure in figures.items():
        FigureCanvasAgg(figure).draw()
        whole, texts = figure.bbox, figure.findobj(lambda artist: hasattr(artist, "get_text") and artist.get_text())
        assert len(texts) > 10
        for text in texts:
            if text.get_visible():
                box = text.get_window_extent()
                inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1
                assert inside, (name, text.get_text())
        heading = figure.get_suptitle()
        assert "a run with a rather long title" in heading.replace("\n", " ")


def test_files(tmp_path):
    found = inspected()
    written = hmf.analysis.write(found, tmp_path / "new" / "folder", "mine")
    assert {path.name for path in written} == {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    stored = json.loads((tmp_path / "new" / "folder" / pictures.NUMBERS).read_text())
    assert stored["title"] == "mine" and stored["tasks"] == [0, 1, 2]
    before = {path: path.read_bytes() for path in written}
    with pytest.raises(InputError, match=r"masks\.json exists: choose another folder"):
        hmf.analysis.write(found, tmp_path / "new" / "folder")
    assert before == {path: path.read_bytes() for path in written}
    (tmp_path / "file").write_text("")
    for folder, why in (("file", "is a file: give a folder$"), ("file/below", "cannot write")):
        with pytest.raises(InputError, match=why):
            hmf.analysis.write(found, tmp_path / folder)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "inspect needs a task or more, not none"),
        ([0, 3], "task 3 does not exist"),
        ([-1], "task -1 does not exist"),
        ([1], "task 1 was removed"),
        ([0, 2, 0], "task 0 is named twice"),
        ([0.0], "a task is an integer"),
        ("0", "a task is an integer"),
        (2, "tasks are ids, such as [0, 1], not 2"),
    ],
)
def test_tasks_that_are_not_there(tasks, message):
    model = small_model()
    model.remove_task(1)
    with pytest.raises(InputError) as caught:
        hmf.analysis.inspect(model, tasks)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_other_things_that_do_not_fit():
    model, x = small_model(), torch.randn(4, 9).double()
    record = hmf.analysis.record(model, 0, x)
    with pytest.raises(InputError, match="task 0 was recorded with other samples than these"):
        hmf.analysis.inspect(model, learned=[record], inputs={0: x + 1})
    with pytest.raises(InputError, match="the record of task 0 is of another network"):
        hmf.analysis.inspect(with_logits(torch.randn(1, 10), 30), learned=[record])
    with pytest.raises(InputError, match="the record of task 0 is of another network"):
        hmf.analysis.inspect(model, learned=[dataclasses.replace(record, sizes=(98, 11, 33))])
    for call in (hmf.analysis.inspect, lambda net: hmf.analysis.record(net, 0, x)):
        with pytest.raises(InputError, match="only a HyperMask model has masks to look at, not Linear"):
            call(nn.Linear(2, 2))
    with pytest.raises(InputError, match="task 5 does not exist"):
        hmf.analysis.record(model, 5)
    two = hmf.HyperMask(nn.Conv1d(2, 3, 1), 2, 30, SMALL, heads="")
    with pytest.raises(InputError, match=r"outputs are compared where they are \(4, classes\), not \(4, 3, 5\)"):
        hmf.analysis.record(two, 0, torch.randn(4, 2, 5))
    with torch.no_grad():
        model.hypernet.output.bias[3] = float("nan")
    with pytest.raises(InputError, match=r"the masks of 0\.weight are not finite: has training diverged\?"):
        hmf.analysis.inspect(model)
