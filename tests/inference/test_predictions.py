"""Which task: every method against its formula, scores, rejection, and what is refused."""

import pytest
import torch
from support.networks import blob_model, blob_scenario, small_convnet
from support.tolerances import assert_close
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.inference import METHODS, FeCAM, Mahalanobis, predict
from hypermask_fast.training.config import TrainingConfig
from hypermask_fast.training.trainer import Trainer


def trained(tasks=4, **settings):
    scenario = blob_scenario(tasks)
    model = blob_model(tasks, **settings)
    config = TrainingConfig(lr=0.01, batch_size=16, iterations=60)
    Trainer(model, scenario, config, progress=False).fit()
    return model.eval(), scenario


def images(n=6, seed=0):
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


FORMULAS = {
    "entropy": lambda y: (y.softmax(-1) * y.log_softmax(-1)).sum(-1),
    "max_softmax": lambda y: y.softmax(-1).max(-1).values.log(),
    "energy": lambda y: y.exp().sum(-1).log(),
}


@pytest.mark.parametrize("method", FORMULAS)
def test_methods_of_logits(method, convnet_model):
    model, x = convnet_model.eval(), images()
    logits = model.forward_all_tasks(x).double()
    expected = FORMULAS[method](logits)
    found = predict(model, x, method=method)
    assert_close(found.score, expected.T, "network")
    assert torch.equal(found.task, expected.argmax(0))
    assert torch.equal(found.label, logits[found.task, torch.arange(6)].argmax(-1))
    assert torch.equal(model.infer_task(x, method=method), found.task)
    assert_close(found.rejection, -expected.max(0).values, "network")


def test_the_default_is_entropy_until_something_better_is_fitted():
    model, scenario = trained()
    x = scenario.tasks[2].test.inputs
    assert torch.equal(predict(model, x).score, predict(model, x, method="entropy").score)
    Mahalanobis.fit(model, scenario)
    assert torch.equal(predict(model, x).score, predict(model, x, method="mahalanobis").score)
    assert torch.equal(model.infer_task(x), predict(model, x).task)


# -- the gradient -----------------------------------------------------------------------------------------------------


def gradient_by_definition(model, x, tasks):
    """-dH/d alpha of a network whose every weight is sum_t alpha_t W * m_t, by autograd through all of it."""
    plain = small_convnet().eval()
    alpha = torch.full((len(tasks),), 1 / len(tasks), requires_grad=True)
    masks = [{name: m.detach() for name, m in model.mask(task).masks().items()} for task in tasks]
    state = {}
    for name, _ in plain.named_parameters():
        own = dict(model.net.named_parameters())[name].detach()
        masked = name in masks[0] and name != "5.bias"
        state[name] = sum(a * own * m[name] for a, m in zip(alpha, masks, strict=True)) if masked else own
    for name in ("running_mean", "running_var"):
        state[f"1.{name}"] = model.net[1]._buffers[name][list(tasks)].mean(0)
    y = torch.func.functional_call(plain, state, (x,))
    entropy = -(y.softmax(-1) * y.log_softmax(-1)).sum(-1).mean()
    return -torch.autograd.grad(entropy, alpha)[0]


def test_the_gradient_is_that_of_the_superposition(convnet_model):
    model, x = convnet_model, images(20)
    for task in range(3):
        model(images(8, task), task)  # statistics that differ
    model.eval()
    expected = gradient_by_definition(model, x, [0, 1, 2])
    found = predict(model, x, method="gradient")
    assert found.score.shape == (20, 3) and (found.score == found.score[0]).all(), "one decision for the batch"
    assert_close(found.score[0], expected, "network")
    assert (found.task == expected.argmax()).all()
    assert torch.equal(found.label, model(x, int(expected.argmax())).argmax(-1))
    assert not any(p.grad is not None for p in model.parameters())
    two = predict(model, x, model.all_masks([2, 0]), method="gradient")
    assert_close(two.score[0], gradient_by_definition(model, x, [2, 0]), "network")


def test_halving_ends_with_two(convnet_model):
    from hypermask_fast.inference.gradient import scores

    torch.manual_seed(0)
    model = hmf.HyperMask(small_convnet(), 7, 30, hmf.HypernetConfig(6, (8,))).eval()
    masks, x = model.all_masks(), images(20)
    first = gradient_by_definition(model, x, range(7)).topk(4).indices.sort().values
    second = first[gradient_by_definition(model, x, first.tolist()).topk(2).indices.sort().values]
    found = scores(model, (x,), {}, masks, halving=True)
    assert found.isfinite().nonzero().flatten().tolist() == second.tolist()
    assert_close(found[second], gradient_by_definition(model, x, second.tolist()), "network")
    assert torch.equal(predict(model, x, method="gradient", halving=True).score[0], found)


def test_gradient_and_entropy_decide_together(convnet_model):
    model, x = convnet_model.eval(), images(20)
    entropy = FORMULAS["entropy"](model.forward_all_tasks(x))
    order = predict(model, x, method="gradient").score[0].topk(3).indices
    for k in (1, 2, 3):
        found = predict(model, x, method="gradient+entropy", k=k)
        best = order[:k]
        assert torch.equal(found.task, best[entropy[best].argmax(0)])
        assert (found.score.isfinite().sum(1) == k).all()
    assert torch.equal(found.task, entropy.argmax(0))


# -- any model --------------------------------------------------------------------------------------------------------


def fit_all(model, scenario):
    FeCAM.fit(model, scenario)
    Mahalanobis.fit(model, scenario)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_serves_in_inference_mode(method):
    model, scenario = trained()
    fit_all(model, scenario)
    x = scenario.tasks[1].test.inputs
    expected = predict(model, x, method=method)
    with torch.inference_mode():
        found = predict(model, x.clone(), method=method)
        masks = model.all_masks()
        predict(model, x, masks, method=method)
    assert torch.equal(found.task, expected.task) and torch.equal(found.score, expected.score)
    assert predict(model, x, masks, method=method).score.shape == (100, 4), "outside, under masks made inside"


@pytest.mark.parametrize("method", METHODS)
def test_removed_tasks_are_never_chosen_and_parts_can_be_asked(method):
    model, scenario = trained()
    fit_all(model, scenario)
    x = scenario.tasks[1].test.inputs
    whole = predict(model, x, method=method)
    assert whole.score.shape == (100, 4)
    part = predict(model, x, model.all_masks([3, 1]), method=method)
    assert part.score.shape == (100, 2) and set(part.task.tolist()) <= {1, 3}
    if not method.startswith("gradient"):
        assert_close(part.score, whole.score[:, [3, 1]], "network")
    model.remove_task(1)
    left = predict(model, x, method=method)
    assert left.score.shape == (100, 4) and (left.score[:, 1] == -torch.inf).all()
    assert 1 not in left.task
    if not method.startswith("gradient"):
        assert_close(left.score[:, [0, 2, 3]], whole.score[:, [0, 2, 3]], "network")


def test_tasks_of_different_sizes():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    model = hmf.HyperMask(net, 3, 20, classes=[2, 4, 3]).eval()
    counts = (2, 4, 3)
    data = {t: (torch.randn(60, 8) + t, torch.arange(60) % counts[t]) for t in range(3)}
    FeCAM.fit(model, data)
    Mahalanobis.fit(model, data)
    x = torch.randn(50, 8) + 1
    for method in METHODS:
        found = predict(model, x, method=method)
        assert (found.label < torch.tensor(counts)[found.task]).all(), method
        assert (found.absolute(counts) < 9).all()


class Given(nn.Module):
    """The logits that a test says, whatever the weights: its last layer's inputs times 0, plus its own."""

    def __init__(self, logits):
        super().__init__()
        self.fc, self.logits = nn.Linear(2, logits.shape[-1]), logits

    def forward(self, x):
        return 0 * self.fc(x) + self.logits[: len(x)]


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_outputs_are_as_unsure_whatever_the_number_of_classes(dtype, removed):
    """A task of few classes has no advantage, nor has one of many."""
    logits = torch.zeros(2, 6, dtype=dtype)
    logits[1] = torch.tensor([2.0, 0, 0, 0, 0, 0])
    model = hmf.HyperMask(Given(logits).to(dtype), 4, 0, classes=[2, 6, 3, 1]).eval()
    if removed:
        model.remove_task(0)
    x, sizes = torch.zeros(2, 2, dtype=dtype), torch.tensor([2, 6, 3, 1]).double()
    softmax = [logits[1, :n].double().softmax(0) for n in (2, 6, 3, 1)]
    entropies = torch.stack([-(p * p.log()).sum() for p in softmax])
    largest = sizes.log().clamp(min=1e-9)
    expected = {
        "entropy": (-1.0, -entropies / largest),
        "max_softmax": (-1.0, torch.stack([p[0].log() for p in softmax]) / largest),
        "energy": (0.0, torch.stack([logits[1, :n].double().logsumexp(0) for n in (2, 6, 3, 1)]) - sizes.log()),
    }
    rows = [1, 2] if removed else [0, 1, 2]
    for method, (uniform, other) in expected.items():
        found = predict(model, x, method=method)
        for score, tasks in (
            (found.score, rows),
            (predict(model, x, model.all_masks([2, 1]), method=method).score, [2, 1]),
        ):
            columns = tasks if score.shape[1] == 4 else [0, 1]
            assert_close(score[0, columns].double(), torch.full((len(columns),), uniform).double(), "network")
            assert_close(score[1, columns].double(), other[tasks], "network")
        if method != "energy":
            assert found.task[0] == 3 and (found.score[:, 3] == 0).all(), "one class leaves nothing to be unsure of"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fidelity", ["default", "official"])
def test_networks_with_batch_norm(method, fidelity):
    torch.manual_seed(0)
    model = hmf.HyperMask(small_convnet(), 3, 30, fidelity=fidelity, per_task="norm")
    data = {t: (images(30, t) + t, torch.arange(30) % 5) for t in range(3)}
    for task, (x, _) in data.items():
        model(x, task)
    model.eval()
    FeCAM.fit(model, data)
    Mahalanobis.fit(model, data)
    found = predict(model, images(10, 9), method=method)
    assert found.score.shape == (10, 3) and not found.score.isnan().any()


class Dictionary(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 12), nn.Linear(12, 2)

    def forward(self, x, scale=1.0):
        return {"answer": self.head(self.body(x).relu() * scale)}


@pytest.mark.parametrize("method", METHODS)
def test_networks_with_outputs_and_inputs_of_their_own(method):
    torch.manual_seed(0)
    model = hmf.HyperMask(Dictionary(), 3, 20).eval()
    data = {t: (torch.randn(40, 8) + t, torch.arange(40) % 2) for t in range(3)}
    FeCAM.fit(model, data)
    Mahalanobis.fit(model, data)
    x = torch.randn(9, 8)

    def answer(y):
        return y["answer"]

    found = predict(model, x, method=method, select=answer, scale=1.0)
    assert torch.equal(model.infer_task(x, method=method, select=answer), found.task)
    assert torch.equal(model.infer_task(x=x, scale=1.0, method=method, select=answer), found.task)


# -- none of the tasks ------------------------------------------------------------------------------------------------


def auroc(known, unknown):
    """The share of pairs in which the unknown sample has the higher score."""
    return (unknown[:, None] > known).double().mean().item() + 0.5 * (unknown[:, None] == known).double().mean().item()


def test_samples_of_no_task_are_told_by_the_rejection_score():
    model, scenario = trained(4)
    known = torch.cat([task.test.inputs for task in scenario.tasks[:3]])
    unknown = scenario.tasks[3].test.inputs
    model.remove_task(3)  # its classes are held out
    first = {task: scenario.tasks[task].train for task in range(3)}
    Mahalanobis.fit(model, first)
    FeCAM.fit(model, first)
    area = {
        m: auroc(predict(model, known, method=m).rejection, predict(model, unknown, method=m).rejection)
        for m in METHODS
    }
    assert area["mahalanobis"] > 0.8 and area["fecam"] > 0.6
    assert area["mahalanobis"] > area["entropy"]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "guess"}, "method must be one of entropy, max_softmax, .*, not 'guess'"),
        ({"method": None, "masks": []}, "masks must be those of a task or more"),
        ({"method": "fecam"}, r"method fecam needs training data first: hmf.inference.FeCAM.fit\(model, data\)"),
        ({"method": "fecam_task"}, "hmf.inference.FeCAM.fit"),
        ({"method": "mahalanobis"}, "hmf.inference.Mahalanobis.fit"),
        ({"method": "gradient+entropy", "k": 5}, "k must be a whole number from 1 to the number of tasks, 4, not 5"),
        ({"method": "gradient+entropy", "k": 0}, "not 0"),
        ({"method": "gradient+entropy", "k": 1.5}, "not 1.5"),
        ({"method": "entropy", "halving": True}, "halving is for the gradient"),
    ],
)
def test_bad_arguments(arguments, message):
    model, x = blob_model(4).eval(), torch.randn(5, 8)
    with pytest.raises(InputError, match=message) as caught:
        predict(model, x, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch(method):
    model, scenario = blob_model(3).eval(), blob_scenario()
    fit_all(model, scenario)
    with pytest.raises(InputError, match="an empty batch has no task to infer"):
        predict(model, torch.zeros(0, 8), method=method)


def test_features_that_are_not_finite():
    model, scenario = blob_model(3).eval(), blob_scenario()
    fit_all(model, scenario)
    x = torch.randn(5, 8)
    x[2, 3] = float("nan")
    for method in ("fecam", "mahalanobis"):
        with pytest.raises(InputError, match="features of layer '.*' are not finite under task 0's mask"):
            predict(model, x, method=method)


def test_another_thread_s_pass_has_features_of_its_own():
    import threading

    model, scenario = blob_model(3).eval(), blob_scenario()
    fit_all(model, scenario)
    x = scenario.tasks[0].test.inputs
    expected = predict(model, x, method="fecam").score
    found, errors = [], []

    def work():
        try:
            found.extend(predict(model, x, method="fecam").score for _ in range(10))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and all(torch.equal(score, expected) for score in found)
