"""Training where tasks have different numbers of classes."""

import pytest
import torch
from support.training import config
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.data import Scenario, TaskData, TensorSplit
from hypermask_fast.training import evaluation
from hypermask_fast.training.exported import export_model, load_exported
from hypermask_fast.training.trainer import Trainer


def sized_scenario(classes=(2, 3, 2)):
    """Blobs as before, each task with as many as it says."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for t, count in enumerate(classes):
        centres = 2 * torch.randn(count, 8, generator=generator)

        def split(n, count=count, centres=centres):
            labels = torch.arange(n) % count
            return TensorSplit(centres[labels] + torch.randn(n, 8, generator=generator), labels)

        data.append(TaskData(f"blobs {t}", split(200), split(60), split(100), num_classes=count))
    return Scenario("sizes", tuple(data), (8,), max(classes))


def sized_model(classes=(2, 3, 2), **settings):
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    torch.manual_seed(0)
    return hmf.HyperMask(net, len(classes), 20, hmf.HypernetConfig(8, (12,)), classes=classes, **settings)


def test_tasks_of_different_sizes_are_learned_and_told_apart(tmp_path):
    scenario, model = sized_scenario(), sized_model(beta=1.0, lam=0.1)
    assert scenario.classes == (2, 3, 2)
    result = Trainer(model, scenario, config(iterations=100, keep="best"), run_dir=tmp_path).fit()
    assert result.matrix[2].min() > 80
    found = evaluation.entropy_accuracy(model, scenario, 50)
    assert found.task.isfinite().all() and (found.label <= found.task).all()
    export_model(model, scenario, 0, tmp_path / "net.safetensors")
    loaded = load_exported(tmp_path / "net.safetensors", sized_model().unconvert())
    x = scenario.tasks[0].test.inputs
    torch.testing.assert_close(loaded(x), model.eval()(x, 0))
    assert loaded.exported.class_names == ("0", "1") and loaded(x).argmax(-1).max() == 1
    again = sized_model(beta=1.0, lam=0.1)
    resumed = Trainer(again, scenario, config(iterations=100, keep="best"), run_dir=tmp_path).fit(resume=True)
    assert torch.equal(resumed.matrix, result.matrix)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (None, r"the scenario's tasks differ in their number of classes, \[2, 3, 2\]: tell the model"),
        ((2, 3, 3), r"the scenario's tasks have \[2, 3, 2\] classes, the model's \[2, 3, 3\]"),
    ],
)
def test_sizes_that_the_model_does_not_know_are_refused(classes, message):
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3))
    with pytest.raises(InputError, match=message):
        Trainer(hmf.HyperMask(net, 3, classes=classes), sized_scenario(), config())
