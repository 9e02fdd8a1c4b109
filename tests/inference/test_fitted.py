"""Statistics are part of the model: kept with it, gone with a task, and never stale in silence."""

import copy
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.networks import blob_model, blob_scenario, small_convnet
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.inference import FeCAM, Mahalanobis, fingerprint, predict
from hypermask_fast.inference.fingerprint import fingerprints
from hypermask_fast.training import run
from hypermask_fast.training.config import TrainingConfig
from hypermask_fast.training.trainer import Trainer

STALE = "weights have changed since {} was fitted for task {}"


def fitted_model():
    model, scenario = blob_model(3).eval(), blob_scenario()
    FeCAM.fit(model, scenario, shrinkage=(0.5, 0.25))
    Mahalanobis.fit(model, scenario, shrinkage=0.02)
    return model, scenario.tasks[0].test.inputs


def another_model():
    model = blob_model(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    return model


def same(model, other, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is stale
        for method in ("fecam", "mahalanobis"):
            mine, theirs = model.fitted[method], other.fitted[method]
            assert mine.settings() == theirs.settings() and mine.layer == theirs.layer
            assert torch.equal(predict(model, x, method=method).score, predict(other, x, method=method).score)


# -- kept -------------------------------------------------------------------------------------------------------------


def test_in_a_state_dict(tmp_path):
    model, x = fitted_model()
    other = blob_model(3).eval()
    plain = other.state_dict()
    assert not any("fitted" in name for name in plain), "nothing where nothing is fitted"
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    same(model, other, x)
    other.load_state_dict(plain)
    assert other.fitted == {}, "a whole state of a model without statistics"


def test_in_a_folder(tmp_path):
    model, x = fitted_model()
    model.save_pretrained(tmp_path)
    same(model, hmf.HyperMask.from_pretrained(tmp_path, blob_model(3).unconvert()).eval(), x)


def test_in_copies_and_pickles():
    model, x = fitted_model()
    same(model, copy.deepcopy(model), x)
    same(model, pickle.loads(pickle.dumps(model)), x)


def test_in_a_run_s_checkpoint(tmp_path):
    model, scenario = blob_model(3), blob_scenario()
    settings = TrainingConfig(lr=0.01, batch_size=16, iterations=20)

    def fit(result):
        if not result.matrix[-1].isnan().any():  # the last task is learned
            Mahalanobis.fit(model, scenario)
            FeCAM.fit(model, scenario)
            trainer._save()

    trainer = Trainer(model, scenario, settings, run_dir=tmp_path, on_task_end=fit)
    trainer.fit()
    other = blob_model(3)
    assert run.load_model(tmp_path, other) == 3
    same(model.eval(), other, scenario.tasks[0].test.inputs)
    again = Trainer(blob_model(3), scenario, settings, run_dir=tmp_path)
    again.fit(resume=True)
    same(model, again.model.eval(), scenario.tasks[0].test.inputs)


def test_on_the_model_s_device_in_float64():
    model, _ = fitted_model()
    model.half()
    assert model.fitted["fecam"].of_task[0].covariances.dtype == torch.float64
    model.float().to("cpu")
    assert model.fitted["fecam"].of_task[0].means.device == next(model.parameters()).device


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("state.fitted.fecam.about"), "statistics of fecam are damaged"),
        (lambda s: s.pop("state.fitted.fecam.1.means"), "statistics of fecam are damaged"),
        (lambda s: s.update({"state.fitted.fecam.1.means": torch.ones(2, 3).double()}), "covariances of task 1"),
        (lambda s: s["state.fitted.mahalanobis.2.covariances"].fill_(float("nan")), "or not finite"),
        (lambda s: s.update({"state.fitted.mahalanobis.9.x": torch.ones(1)}), "statistics of mahalanobis are damaged"),
        (lambda s: s.update({"state.fitted.other.about": torch.ones(1)}), "statistics of 'other'"),
        (lambda s: s["state.fitted.mahalanobis.about"].fill_(1), "statistics of mahalanobis are damaged"),
    ],
)
def test_damaged_statistics_are_refused_before_anything_changes(change, message):
    model, _ = fitted_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(state)
    other = another_model()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(InputError, match=message) as caught:
        other.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert other.fitted == {}


# -- never stale in silence -------------------------------------------------------------------------------------------


def trained(model):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model(torch.randn(8, 8), 2).sum().backward()
    optimizer.step()


def loaded(model):
    state = {name: t.clone() for name, t in another_model().state_dict().items() if not name.startswith("state.")}
    model.load_state_dict(state)


CHANGES = {
    "a step": trained,
    "a step of the library's optimiser": lambda model: _step(model),
    "another state, of tensors alone": loaded,
    "in place": lambda model: model.net[0].weight.detach().mul_(1.001),
    "through .data": lambda model: model.net[0].weight.data.add_(1e-3),
    "another tensor": lambda model: setattr(model.hypernet.output.weight, "data", model.hypernet.output.weight * 1.01),
}


def _step(model):
    optimizer = hmf.optim.Adam(model, lr=1e-3)
    model.train()
    mask = model.mask(0)
    model(torch.randn(8, 8), mask).sum().backward()
    optimizer.step()
    model.eval()


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_said(change):
    model, x = fitted_model()
    same(model, model, x)
    CHANGES[change](model)
    for method, kind in (("fecam", "FeCAM"), ("mahalanobis", "Mahalanobis")):
        with pytest.warns(UserWarning, match=STALE.format(kind, "0, 1, 2")):
            predict(model, x, method=method)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            predict(model, x, method=method)  # said once
    Mahalanobis.fit(model, blob_scenario())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(model, x, method="mahalanobis")


def test_a_task_that_was_not_looked_at_yet_is_still_said():
    """A use of a task that was fitted again says nothing about the others, whose warning is still to come."""
    model, x = fitted_model()
    with torch.no_grad():
        model.net[0].weight.add_(0.01)
    model.fitted["fecam"].update(model, {2: blob_scenario().tasks[2].train})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(model, x, model.all_masks([2]), method="fecam")
    with pytest.warns(UserWarning, match=STALE.format("FeCAM", "1:")):
        predict(model, x, model.all_masks([1, 2]), method="fecam")
    with pytest.warns(UserWarning, match=STALE.format("FeCAM", "0:")):
        predict(model, x, method="fecam")


def test_a_model_made_in_inference_mode_has_statistics_too():
    """Its tensors have no version counters."""
    with torch.inference_mode():
        model, x = fitted_model()
        same(model, model, x)
        model.net[0].weight.mul_(1.5)
        with pytest.warns(UserWarning, match=STALE.format("FeCAM", "0, 1, 2")):
            predict(model, x, method="fecam")


@pytest.mark.parametrize("words_at_once", [1 << 17, 32])
def test_weights_that_change_places_are_others(monkeypatch, words_at_once):
    """Two neighbours of 8 bytes, rows (which are taken together or one after the other), and a value with its
    negative."""
    monkeypatch.setattr(fingerprint, "_AT_ONCE", words_at_once)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    model = hmf.HyperMask(net, 1, hypernetwork=hmf.HypernetConfig(6, (8,)))
    weight = model.net[0].weight.data
    weight[0, 4:8] = torch.tensor([1.0, 2.0, 1.0, -2.0])
    found = {fingerprints(model, [0])[0]}
    for one, other in ((weight[0, :2], weight[0, 2:4]), (weight[0, 4:6], weight[0, 6:8]), (weight[1], weight[2])):
        kept = one.clone()
        one.copy_(other), other.copy_(kept)
        found.add(fingerprints(model, [0])[0])
    assert len(found) == 4


def test_changed_while_it_was_stored(tmp_path):
    model, x = fitted_model()
    with torch.no_grad():
        model.net[0].weight[0, 0] += 1  # and nobody has predicted since
    model.save_pretrained(tmp_path)
    other = hmf.HyperMask.from_pretrained(tmp_path, blob_model(3).unconvert()).eval()
    with pytest.warns(UserWarning, match=STALE.format("FeCAM", "0, 1, 2")):
        predict(other, x, method="fecam")


def test_statistics_of_batch_norm_are_a_task_s_own():
    torch.manual_seed(0)
    model = hmf.HyperMask(small_convnet(), 3, 30, hmf.HypernetConfig(6, (8,)))
    data = {t: (torch.randn(30, 2, 8, 8) + t, torch.arange(30) % 5) for t in range(3)}
    FeCAM.fit(model.eval(), data)
    model.train()(data[1][0], 1)  # moves the running statistics of task 1, and nothing else
    model.eval()
    with pytest.warns(UserWarning, match=STALE.format("FeCAM", "1:")):
        predict(model, data[0][0], method="fecam")


def test_the_life_of_tasks():
    model, x = fitted_model()
    score = predict(model, x).score
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.freeze_task(1)
        assert model.add_task() == 3
        with pytest.raises(InputError, match="Mahalanobis has not been fitted for task 3"):
            predict(model, x)
        torch.testing.assert_close(predict(model, x, model.all_masks([0, 1, 2])).score, score)
        model.fitted["mahalanobis"].update(model, {3: blob_scenario(4).tasks[3].train})
        assert predict(model, x).score.shape[1] == 4
        model.remove_task(0)
        assert set(model.fitted["mahalanobis"].of_task) == {1, 2, 3}
        assert 0 not in predict(model, x).task
        assert "state.fitted.fecam.0.means" not in model.state_dict()
    with pytest.raises(InputError, match="data of task 0: this model has tasks 1, 2, 3"):
        FeCAM.fit(model, {0: blob_scenario().tasks[0].train})


def test_fitting_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = hmf.HyperMask(small_convnet(), 2, 30, hmf.HypernetConfig(6, (8,)))
    model.net[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    FeCAM.fit(model, {t: (torch.randn(30, 2, 8, 8), torch.arange(30) % 5) for t in range(2)})
    assert model.training and not model.net[1].training
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert not model.net[5]._forward_pre_hooks


def test_parameters_of_each_task_s_own_are_no_other_task_s():
    torch.manual_seed(0)
    model = hmf.HyperMask(small_convnet(), 3, 30, hmf.HypernetConfig(6, (8,)), per_task="norm").eval()
    data = {t: (torch.randn(30, 2, 8, 8) + t, torch.arange(30) % 5) for t in range(3)}
    FeCAM.fit(model, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_task(like=1)
        predict(model, data[0][0], model.all_masks([0, 1, 2]), method="fecam")
    with torch.no_grad():
        model.own["1/weight"][1].mul_(2)
    with pytest.warns(UserWarning, match=STALE.format("FeCAM", "1:")):
        predict(model, data[0][0], model.all_masks([0, 1, 2]), method="fecam")
