"""Tasks that are removed: the others stay as they are, and who asks for a removed one is told."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.life import HYPERNETWORKS, batch, model_of, own_of, stir, train
from support.networks import blob_model, blob_scenario
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.training.config import TrainingConfig
from hypermask_fast.training.evaluation import entropy_accuracy
from hypermask_fast.training.trainer import Trainer


@pytest.mark.parametrize("hypernetwork", HYPERNETWORKS)
def test_ids_of_others_stay(hypernetwork):
    model = model_of(**({} if hypernetwork is None else {"hypernetwork": hypernetwork})).eval()
    x, _ = batch()
    before = [model(x, task) for task in range(4)]
    model.remove_task(1)
    assert model.tasks == (0, 2, 3) and model.num_tasks == 4
    for task in model.tasks:
        torch.testing.assert_close(model(x, task), before[task])
    assert model.add_task() == 4 and model.tasks == (0, 2, 3, 4)


def entry_points():
    x, _ = batch()
    mixed = torch.tensor([0, 1] * 6)
    return {
        "forward": lambda m: m(x, 1),
        "by name": lambda m: m(x, task=1),
        "tensor": lambda m: m(x, torch.tensor(1)),
        "mixed": lambda m: m(x, mixed),
        "mask": lambda m: m.mask(1),
        "all_masks": lambda m: m.all_masks([0, 1]),
        "use_task": lambda m: m.use_task(1).__enter__(),
        "export": lambda m: m.export(1),
        "begin": lambda m: m.begin_task(1),
        "regularizer": lambda m: m.regularizer(1),
        "drifts": lambda m: m.drifts(1),
        "freeze": lambda m: m.freeze_task(1),
        "remove": lambda m: m.remove_task(1),
    }


@pytest.mark.parametrize("name", entry_points())
def test_a_removed_task_asked_for_is_refused(name):
    model = model_of().eval()
    model.remove_task(1)
    with pytest.raises(InputError, match=r"^task 1 was removed: this model has tasks 0, 2, 3$"):
        entry_points()[name](model)


def test_a_mask_from_before_the_removal_is_refused():
    model = model_of().eval()
    x, _ = batch()
    mask = model.mask(1)
    masks = model.all_masks()
    model.remove_task(1)
    for call in (
        lambda: model(x, mask),
        lambda: model.forward_all_tasks(x, masks=masks),
        lambda: model.regularizer(mask),
    ):
        with pytest.raises(InputError, match="task 1 was removed"):
            call()


def test_a_task_that_is_not_looked_at_and_was_removed_gives_nan(monkeypatch):
    model = model_of().eval()
    model.remove_task(0)
    x, _ = batch()
    expected = model(x, 2)
    monkeypatch.setattr("hypermask_fast.mask_making.values_at_hand", lambda tensor: False)
    assert model(x, torch.tensor(0)).isnan().all()
    torch.testing.assert_close(model(x, torch.tensor(2)), expected)


def test_all_tasks_by_id():
    model = model_of().eval()
    x, _ = batch(n=30)
    before = model.forward_all_tasks(x)
    model.remove_task(1)
    outputs = model.forward_all_tasks(x)
    assert outputs.shape == before.shape and outputs[1].isnan().all()
    torch.testing.assert_close(outputs[[0, 2, 3]], before[[0, 2, 3]])
    masks = model.all_masks()
    assert [mask.task for mask in masks] == [0, 2, 3]
    torch.testing.assert_close(model.forward_all_tasks(x, masks=masks), before[[0, 2, 3]])  # rows as the masks lie
    entropy = torch.distributions.Categorical(logits=before).entropy()
    entropy[1] = torch.inf
    assert torch.equal(model.infer_task(x), entropy.argmin(0)) and 3 in entropy.argmin(0)
    for given in (None, masks, list(masks)):
        found = hmf.predict(model, x, given)
        assert torch.equal(found.task, entropy.argmin(0))  # ids, whichever masks are given
        assert torch.equal(found.label, model(x, found.task).argmax(-1))


def test_several_outputs_by_id():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            y = self.fc(x)
            return {"logits": y, "label": y.argmax(-1)}

    model = hmf.HyperMask(Two(), 3, heads="fc").eval()
    model.remove_task(0)
    outputs = model.forward_all_tasks(batch()[0])
    assert outputs["logits"][0].isnan().all() and (outputs["label"][0] == -1).all()
    assert (outputs["label"][1:] >= 0).all()


@pytest.mark.parametrize("hypernetwork", HYPERNETWORKS)
@pytest.mark.parametrize("fidelity", ["default", "official"])
def test_drifts_and_their_scale_count_what_is_left(hypernetwork, fidelity):
    """R over the tasks that are left, by autograd over the logits in float64; before and after the task begins."""
    settings = {} if hypernetwork is None else {"hypernetwork": hypernetwork}

    def expected(model, targets, previous):
        left = [j for j in model.tasks if j < 3]
        output = sum((model.hypernet([j])[0] - targets[j]).square().sum() for j in left)
        masks = model.mask(3).masks().values()
        weight = sum(((w - p) * m).abs().sum() for w, p, m in zip(model.weights(), previous, masks, strict=True))
        return 0.5 * output / len(left) ** (2 if fidelity == "official" else 1) + 0.1 * weight

    for early in (True, False):
        model = model_of(beta=0.5, fidelity=fidelity, **settings).double().eval()
        if early:
            model.remove_task(1)
        model.begin_task(3)
        if not early:
            model.remove_task(1)
        assert model.regularizer(3) < 1e-28  # the last bits of a product's rows depend on how many there are
        targets = [model.hypernet([j])[0].detach() for j in range(4)]
        previous = [weight.detach().clone() for weight in model.weights()]
        stir(model)
        by_hand = expected(model, targets, previous)
        found = model.regularizer(3)
        torch.testing.assert_close(found, by_hand)
        trained = [p for p in model.parameters() if p.requires_grad]
        for a, b in zip(*(torch.autograd.grad(r, trained, allow_unused=True) for r in (found, by_hand)), strict=True):
            torch.testing.assert_close(a, b)


def test_without_an_earlier_task_there_is_no_drift():
    for early in (True, False):
        model = model_of(2)
        if early:
            model.remove_task(0)
        model.begin_task(1)
        if not early:
            model.remove_task(0)
        stir(model)
        assert model.regularizer(1) == 0  # as in a first task
        train(model, 1)


@pytest.mark.parametrize("hypernetwork", HYPERNETWORKS)
def test_the_librarys_optimiser_goes_on(hypernetwork):
    model = model_of(**({} if hypernetwork is None else {"hypernetwork": hypernetwork})).double()
    ordinary = copy.deepcopy(model)
    for one in (model, ordinary):
        optimizer = hmf.optim.Adam(one, 1e-2) if one is model else torch.optim.Adam(one.parameters(), 1e-2)
        for removed in ((), (1,)):
            for task in removed:
                one.remove_task(task)
            for step in range(3):
                one.train()
                torch.manual_seed(step)
                mask = one.mask(2)
                x, y = batch(step)
                loss = F.cross_entropy(one(x.double(), mask), y) + one.regularizer(mask)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    torch.testing.assert_close(model.state_dict(), ordinary.state_dict())
    assert all((value == 0).all() for value in own_of(model, 1)[:-3])


def test_the_last_task_stays():
    model = model_of(2)
    model.remove_task(0)
    with pytest.raises(InputError, match="task 1 is the only one left"):
        model.remove_task(1)


def test_evaluation_has_nan_for_a_removed_task():
    model, scenario = blob_model(3), blob_scenario(3)
    before = entropy_accuracy(model, scenario, 50)
    assert before.task.isfinite().all()
    model.remove_task(1)
    found = entropy_accuracy(model, scenario, 50)
    assert found.task[1].isnan() and found.label[1].isnan()
    assert (found.task[[0, 2]] >= before.task[[0, 2]]).all()  # one wrong choice less
    with pytest.raises(InputError, match="has 3 tasks, of which the model lacks 1"):
        Trainer(model, scenario, TrainingConfig(iterations=2, batch_size=8))
