"""How masks have moved since a task was learned: entries that flipped, predictions that changed."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from support.analysed import SMALL, small_model, with_logits
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.analysis import Learned, learned


def test_drift_by_hand():
    """Entries 3 and 4 of 8 change places: two flips of eight."""
    a = torch.tensor([[8.0, 7, 6, 5, 1, 1, 1, 1, 0, 0]]) / 8
    model = with_logits(a, 50)
    record = hmf.analysis.record(model, 0)
    (still,) = hmf.analysis.inspect(model, learned=[record]).drift
    assert (still.whole.flipped, still.whole.mask_change, still.whole.logit_change) == (0, 0, 0)
    model.hypernet.output.weight.data[3:5, 0] = torch.tensor([1 / 8, 5 / 8])
    (moved,) = hmf.analysis.inspect(model, learned={0: record}).drift
    assert moved.task == 0 and moved.whole.flipped == 25 and moved.tensors[0].flipped == 25
    m = np.tanh(np.array([8, 7, 6, 5]) / 8)
    assert moved.whole.mask_change == pytest.approx(100 * math.sqrt(2 * m[3] ** 2 / (m * m).sum()), rel=1e-6)
    assert moved.whole.logit_change == pytest.approx(math.sqrt(2 * (4 / 8) ** 2 / 8), rel=1e-6)
    assert moved.samples == 0 and moved.predictions_changed is None and moved.probability_change is None


def test_drift_of_large_tensors_is_estimated_from_a_sample_and_flips_are_counted():
    torch.manual_seed(0)
    a = torch.randn(1, 201 * 300 + 300 + 300 * 2 + 2)
    model = with_logits(a, 30, (201, 300, 2))
    record = hmf.analysis.record(model, 0)
    assert [len(each) for each in record.logits] == [learned.SAMPLE, 300, 600]
    b = a + 0.2 * torch.randn_like(a) * torch.arange(a.shape[1]) / a.shape[1]  # not everywhere the same
    model.hypernet.output.weight.data.copy_(b.t())
    (drift,) = hmf.analysis.inspect(model, learned=[record]).drift
    segments, flips, moved, norm, logits = model.layout.segments[:3], 0, 0.0, 0.0, 0.0
    for s, found in zip(segments, drift.tensors, strict=True):
        x, y = (each[0, s.start : s.stop].double().numpy() for each in (a, b))
        kept = [np.abs(v) >= np.sort(np.abs(v))[math.ceil(0.3 * (s.size - 1))] for v in (x, y)]
        m, n = np.abs(np.tanh(x)) * kept[0], np.abs(np.tanh(y)) * kept[1]
        assert found.flipped == pytest.approx(100 * (kept[0] ^ kept[1]).mean(), rel=1e-12)
        parts = (kept[0] ^ kept[1]).sum(), ((m - n) ** 2).sum(), (m * m).sum(), ((x - y) ** 2).sum()
        tolerance = 0.03 if s.size > learned.SAMPLE else 1e-6
        assert found.mask_change == pytest.approx(100 * math.sqrt(parts[1] / parts[2]), rel=tolerance)
        assert found.logit_change == pytest.approx(math.sqrt(parts[3] / s.size), rel=tolerance)
        flips, moved, norm, logits = flips + parts[0], moved + parts[1], norm + parts[2], logits + parts[3]
    size = segments[-1].stop
    assert drift.whole.entries == size and drift.whole.flipped == pytest.approx(100 * flips / size, rel=1e-12)
    assert drift.whole.mask_change == pytest.approx(100 * math.sqrt(moved / norm), rel=0.03)
    assert drift.whole.logit_change == pytest.approx(math.sqrt(logits / size), rel=0.03)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 10_000, 320_000, 784 * 4096, 38_597_376])
def test_sampled_entries_are_spread_evenly(size):
    chosen = learned.positions(size)
    assert chosen[0] >= 0 and chosen[-1] < size and (np.diff(chosen) > 0).all()
    assert len(chosen) == min(size, 4096) or 4000 < len(chosen) <= 4096 or size < 2 * 4096
    for width in (2, 3, 256, 784):  # no column is favoured
        if size >= 100 * width:
            counts = np.bincount(chosen % width, minlength=width)
            assert counts.max() <= 2 * len(chosen) / width + 3


def test_changed_predictions():
    model = small_model(0).float()
    x = torch.randn(64, 9)
    record = hmf.analysis.record(model, 1, x)
    with torch.no_grad():
        before = model(x, task=1)
        model.net[2].bias.copy_(torch.tensor([0.5, -0.5, 0.0]))  # the output layer's, which no mask acts on
        after = model(x, task=1)
    (drift,) = hmf.analysis.inspect(model, learned=[record], inputs={1: x}).drift
    changed = 100 * (before.argmax(1) != after.argmax(1)).double().mean()
    moved = 100 * (before.double().softmax(1) - after.double().softmax(1)).abs().sum(1).mean() / 2
    assert drift.samples == 64 and 0 < drift.predictions_changed == pytest.approx(float(changed))
    assert drift.probability_change == pytest.approx(float(moved), rel=1e-6)
    assert drift.whole.flipped == drift.whole.mask_change == 0


def test_a_record_is_small_and_reads_back(tmp_path):
    model = small_model()
    record = hmf.analysis.record(model, 2, torch.randn(5, 9).double())
    path = tmp_path / "record"
    record.save(path)
    again = Learned.load(path)
    for field in dataclasses.fields(Learned):
        mine, its = getattr(record, field.name), getattr(again, field.name)
        pairs = zip(mine, its, strict=True) if isinstance(mine, tuple) else [(mine, its)]
        for a, b in pairs:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else np.array_equal(a, b)
    assert [len(bits) for bits in record.kept] == [13, 2, 5]  # of 99, 11 and 33 entries
    before = path.read_bytes()
    for damaged in (b"", b"nothing of ours", before[:-10], before[:40]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"record is no record of a learned task: [^\n]+$"):
            Learned.load(path)
    path.unlink()
    with pytest.raises(InputError, match="record is no record of a learned task: No such file"):
        Learned.load(path)


def test_a_record_can_be_the_first_pass_of_a_model_whose_output_layer_is_found_by_it():
    model = hmf.HyperMask(OutOfOrder(), 2, 30, SMALL)
    with pytest.raises(InputError, match="is found in the first pass: run one batch first, or name it"):
        hmf.analysis.inspect(model)
    with pytest.raises(InputError, match="is found in the first pass"):
        hmf.analysis.record(model, 0)
    assert hmf.analysis.record(model, 0, torch.randn(3, 4)).names == ("head.weight", "body.weight", "body.bias")
    assert [each.name for each in hmf.analysis.inspect(model).tensors] == ["head.weight", "body.weight", "body.bias"]


class OutOfOrder(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(5, 2), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.body(x).relu())
