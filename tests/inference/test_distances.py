"""FeCAM and Mahalanobis: statistics, distances and choices, against recipes in NumPy; what they refuse."""

import numpy as np
import pytest
import torch
from support.networks import blob_scenario
from support.tolerances import assert_close
from torch import nn

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.inference import FeCAM, Mahalanobis, gaussians
from hypermask_fast.inference.gaussians import inverse_root

TASKS, CLASSES, WIDTH = 3, 2, 12


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


def float64_model(tasks=TASKS):
    torch.manual_seed(0)
    return hmf.HyperMask(network().double(), tasks, 30, hmf.HypernetConfig(6, (8,))).eval()


def data(samples=60, tasks=TASKS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for task in range(tasks):
        y = torch.arange(samples) % CLASSES
        x = torch.randn(samples, 8, generator=generator, dtype=torch.float64)
        found[task] = (2 * x + task + torch.nn.functional.one_hot(y, 8) * 3, y)
    return found


def features(model, x, task):
    """By the plain network of the task, layer by layer: what its last layer is given."""
    return model.export(task)[:-1](x).detach().numpy()


# -- the recipe, from the description of the published runs alone ------------------------------------------------------


def shrunk_twice(S):
    for _ in range(2):
        d = np.diag(S).mean()
        off = S[~np.eye(len(S), dtype=bool)]
        off = off[off != 0]
        o = off.mean() if len(off) else 0.0
        S = S + d * np.eye(len(S)) + o * (np.ones_like(S) - np.eye(len(S)))
    return S


def fecam_distances(model, train, x, times=2):
    """(tasks, classes, batch)"""
    found = []
    for task, (inputs, labels) in train.items():
        f = features(model, inputs, task)
        z = features(model, x, task)
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
        row = []
        for label in range(CLASSES):
            mine = f[labels.numpy() == label]
            mu, S = mine.mean(0), np.cov(mine.T)
            S = shrunk_twice(S) if times else S
            R = S / np.sqrt(np.outer(np.diag(S), np.diag(S)))
            inverse = np.linalg.pinv(R + 1e-8, hermitian=True, rcond=len(R) * np.finfo(float).eps)
            delta = z - mu / np.linalg.norm(mu)
            row.append(np.einsum("bi,ij,bj->b", delta, inverse, delta))
        found.append(row)
    return torch.tensor(np.array(found))


@pytest.mark.parametrize("samples", [60, 12], ids=["regular", "singular"])  # 6 of a class in 12 dimensions
def test_fecam_is_the_published_recipe(samples):
    model, train = float64_model(), data(samples)
    x = data(40, seed=1)[1][0]
    fitted = FeCAM.fit(model, train, batch_size=17)
    expected = fecam_distances(model, train, x)
    lowest = min(torch.linalg.eigvalsh(fitted.metric(c)).min() for g in fitted.of_task.values() for c in g.covariances)
    assert (lowest < 0) == (samples == 12), "of few samples shrinkage makes negative eigenvalues too"
    for task in range(TASKS):
        f = torch.tensor(features(model, x, task))
        assert_close(fitted.distances(f, task), expected[task], "statistics", f"task {task}")
    found = hmf.inference.predict(model, x, method="fecam")
    place = expected.flatten(0, 1).argmin(0)
    assert torch.equal(found.task, place // CLASSES) and torch.equal(found.label, place % CLASSES)
    assert_close(found.score, -expected.min(1).values.T, "statistics")
    assert len(found.task.unique()) > 1, "or the test shows nothing"
    own = hmf.inference.predict(model, x, method="fecam_task")
    argmax = torch.stack([model(x, task).argmax(-1) for task in range(TASKS)])
    assert torch.equal(own.task, found.task)
    assert torch.equal(own.label, argmax.gather(0, own.task[None])[0])
    assert torch.equal(model.infer_task(x, method="fecam"), found.task)


def test_an_exactly_singular_correlation_goes_by_its_pseudo_inverse():
    model, train = float64_model(), data(80)
    with torch.no_grad():  # two features that are always the same
        model.net[2].weight[1], model.net[2].bias[1] = model.net[2].weight[0], model.net[2].bias[0]
        for hook in (model.net[4],):
            hook.register_forward_pre_hook(lambda module, args: (_doubled(args[0]),))
    fitted = FeCAM.fit(model, train, times=0)
    x = data(30, seed=1)[0][0]
    f = torch.tensor(_doubled(torch.tensor(features(model, x, 0))).numpy())
    correlation = fitted.metric(fitted.of_task[0].covariances[0])
    assert np.linalg.matrix_rank(correlation.numpy()) < WIDTH
    inverse = torch.linalg.pinv(correlation, hermitian=True)
    z, mu = f / f.norm(dim=1, keepdim=True), fitted.of_task[0].means[0]
    delta = z - mu / mu.norm()
    assert_close(fitted.distances(f, 0)[0], ((delta @ inverse) * delta).sum(1), "statistics")


def _doubled(f):
    """Features of which the second half repeats the first, shifted so that none is constant."""
    half = f[:, : WIDTH // 2] + torch.arange(1, 1 + WIDTH // 2) * f.sum(1, keepdim=True).sin()
    return torch.cat([half, half], 1)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_the_root_of_a_pseudo_inverse(rank, positive):
    torch.manual_seed(rank)
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q[:, :rank]
    matrix = (basis * torch.linspace(0.5, 3, rank, dtype=torch.float64)) @ basis.T
    matrix = matrix if positive else matrix - 5 * torch.outer(basis[:, -1], basis[:, -1])
    root, signs = inverse_root(matrix)
    assert_close(
        root.T @ torch.diag(signs) @ root, torch.linalg.pinv(matrix, hermitian=True), "statistics", f"rank {rank}"
    )


def test_mahalanobis_by_hand():
    model, train = float64_model(), data()
    x = data(40, seed=1)[2][0]
    fitted = Mahalanobis.fit(model, train, shrinkage=0.05)
    rows = []
    for task, (inputs, labels) in train.items():
        f, z = features(model, inputs, task), features(model, x, task)
        f, z = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (f, z))
        for label in range(CLASSES):
            mine = f[labels.numpy() == label]
            S = np.cov(mine.T)
            S = S + 0.05 * np.diag(S).mean() * np.eye(WIDTH)
            delta = z - mine.mean(0)
            rows.append(np.einsum("bi,ij,bj->b", delta, np.linalg.inv(S), delta))
    expected = torch.tensor(np.array(rows))
    found = hmf.predict(model, x)  # the default, where it was fitted
    assert_close(found.score, -expected.view(TASKS, CLASSES, -1).min(1).values.T, "statistics")
    assert torch.equal(found.task * CLASSES + found.label, expected.argmin(0))
    assert torch.equal(found.absolute(CLASSES), expected.argmin(0))
    assert fitted is model.fitted["mahalanobis"]


def test_the_shrinkage_is_chosen_by_validation_data():
    model, train, validation = float64_model(), data(40), data(60, seed=5)
    chosen = Mahalanobis.fit(model, train, validation=validation).shrinkage
    right = {}
    for a in hmf.inference.SHRINKAGES:
        Mahalanobis.fit(model, train, shrinkage=a)
        found = {task: hmf.predict(model, x, method="mahalanobis") for task, (x, _) in validation.items()}
        right[a] = sum(
            int(((found[task].task == task) & (found[task].label == y)).sum()) for task, (_, y) in validation.items()
        )
    assert right[chosen] == max(right.values()) > min(right.values())


# -- the stream -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FeCAM, Mahalanobis])
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_neither_the_batches_nor_their_order_matter(kind, batch):
    model, train = float64_model(), data(300)
    for x, _ in train.values():
        x += 100  # a mean that is large beside the spread
    once = kind.fit(model, train)
    mixed = {}
    for task, (x, y) in train.items():
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(batch))
        mixed[task] = (x[order], y[order])
    other = kind.fit(model, mixed, batch_size=batch)
    for task in range(TASKS):
        assert torch.equal(once.of_task[task].counts, torch.tensor([150, 150]))
        assert_close(other.of_task[task].means, once.of_task[task].means, "statistics")
        largest = once.of_task[task].covariances.abs().max()
        assert_close(other.of_task[task].covariances / largest, once.of_task[task].covariances / largest, "statistics")
        f = torch.tensor(features(model, mixed[task][0], task))
        f = f / f.norm(dim=1, keepdim=True) if kind is Mahalanobis else f
        expected = np.cov(f[mixed[task][1] == 1].T.numpy())
        assert_close(once.of_task[task].covariances[1] / largest, torch.tensor(expected) / largest, "statistics")


def test_data_in_every_form_give_the_same():
    scenario = blob_scenario()
    torch.manual_seed(0)
    model = hmf.HyperMask(network(), TASKS, 30, hmf.HypernetConfig(6, (8,))).eval()
    once = FeCAM.fit(model, scenario)
    tensors = [(task.train.inputs, task.train.labels) for task in scenario.tasks]
    loaders = [torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pair), 50) for pair in tensors]
    named = [[({"input": x}, y) for x, y in loader] for loader in loaders]
    for form in ([task.train for task in scenario.tasks], dict(enumerate(tensors)), loaders, named):
        other = FeCAM.fit(model, form)
        for task in range(TASKS):
            torch.testing.assert_close(other.of_task[task].covariances, once.of_task[task].covariances)


def test_a_task_is_added_to_what_is_fitted():
    model, train = float64_model(), data()
    first = {0: train[0], 1: train[1]}
    fitted = FeCAM.fit(model, first)
    x = train[2][0]
    with pytest.raises(InputError, match=r"FeCAM has not been fitted for task 2: model.fitted\['fecam'\].update"):
        model.infer_task(x, method="fecam")
    assert hmf.predict(model, x, model.all_masks([0, 1]), method="fecam").score.shape == (len(x), 2)
    assert fitted.update(model, {2: train[2]}) is model.fitted["fecam"]
    whole = FeCAM.fit(float64_model(), train)
    for task in range(TASKS):
        assert torch.equal(fitted.of_task[task].covariances, whole.of_task[task].covariances)


# -- which layer ------------------------------------------------------------------------------------------------------


def test_the_layer_is_the_output_layer_or_the_one_that_is_named():
    model, train = float64_model(), data()
    assert FeCAM.fit(model, train).layer == "4"
    fitted = FeCAM.fit(model, train, layer="2")
    assert fitted.layer == "2" and fitted.of_task[0].means.shape == (CLASSES, 16)
    assert len(model.infer_task(train[0][0], method="fecam")) == 60


class Headless(nn.Module):
    """Its output layer has no bias and is not the last one that is defined."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 2, bias=False)
        self.body = nn.Linear(8, 16)

    def forward(self, x):
        return {"logits": self.head(self.body(x).relu())}


def test_an_output_layer_without_a_bias_is_found_by_the_graph():
    torch.manual_seed(0)
    model = hmf.HyperMask(Headless(), 2).eval()
    train = {t: (torch.randn(20, 8) + t, torch.arange(20) % 2) for t in range(2)}
    assert Mahalanobis.fit(model, train).layer == "head"
    assert hmf.predict(model, train[0][0]).task.shape == (20,)
    assert hmf.predict(model, train[0][0], method="entropy").task.shape == (20,)


class Odd(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.body, self.head = way, nn.Linear(8, 8), nn.Linear(8, 2)
        self.unused = nn.Linear(8, 2)

    def forward(self, x):
        if self.way == "twice":
            return self.head(self.body(self.body(x)))
        if self.way == "images":
            return self.head(self.body(x[:, None])).squeeze(1)
        if self.way == "two heads":
            return self.head(x), self.unused(self.body(x))
        return self.head(self.body(x / 0))


@pytest.mark.parametrize(
    ("way", "layer", "message"),
    [
        ("twice", "body", "calls layer 'body' 2 times"),
        ("twice", "unused", "calls layer 'unused' never"),
        ("twice", "nothing", "no layer 'nothing' to take features of; it has body, head, unused"),
        ("twice", "", "no layer ''"),
        ("images", "head", r"is given \(10, 1, 8\), and features are \(batch, D\)"),
        ("two heads", None, "here are 2 that could be it"),
        ("infinite", None, "not finite under task 0's mask"),
    ],
)
@pytest.mark.filterwarnings("ignore:the first forward pass did not use")
def test_layers_that_have_no_features(way, layer, message):
    model = hmf.HyperMask(Odd(way), 2).eval()
    with pytest.raises(InputError, match=message) as caught:
        FeCAM.fit(model, [(torch.randn(10, 8) + 3, torch.arange(10) % 2)] * 2, layer=layer)
    assert "\n" not in str(caught.value) and not model.fitted


# -- what is refused --------------------------------------------------------------------------------------------------


def _one(y):
    return {0: (torch.randn(len(y), 8, dtype=torch.float64), torch.tensor(y))}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (_one([0, 0, 0, 1]), "class 1 of task 0 has one sample"),
        ({0: (torch.zeros(0, 8).double(), torch.zeros(0, dtype=torch.int64))}, "task 0 has no samples"),
        ({0: (torch.ones(6, 8).double(), torch.arange(6) % 2)}, "all samples of class 0 of task 0 have the same"),
        ({7: _one([0, 1])[0]}, "data of task 7: this model has tasks 0, 1, 2"),
        ({}, "no task's data"),
        (5, "data are a Scenario, a mapping"),
        ({0: 5}, "data of task 0 are int"),
        ({0: [5]}, r"a batch of task 0 is \(inputs, labels\)"),
        ({0: (torch.ones(6, 8), torch.ones(6))}, r"labels of task 0 are \(batch,\) int64"),
        ({0: (torch.ones(6, 8), torch.ones(5, dtype=torch.int64))}, "6 inputs and 5 labels"),
        ({0: [(torch.ones(6, 8).double(), torch.ones(5, dtype=torch.int64))]}, "6 inputs and 5 labels"),
        (_one([0, 0, -1, -1]), "int64 of 0 or more"),
    ],
)
@pytest.mark.parametrize("kind", [FeCAM, Mahalanobis])
def test_data_that_can_t_be_fitted(kind, given, message):
    model = float64_model()
    before = kind.fit(model, data())
    with pytest.raises(InputError, match=message) as caught:
        kind.fit(model, given)
    assert "\n" not in str(caught.value)
    assert model.fitted == {kind.name: before} and set(before.of_task) == {0, 1, 2}


def test_validation_data_that_can_be_read_once_are_refused():
    model, everything = float64_model(), data(10)
    once = {task: iter([pair]) for task, pair in everything.items()}
    with pytest.raises(InputError, match="validation data of task 0 are a list_iterator, which can be read only once"):
        Mahalanobis.fit(model, everything, validation=once)
    Mahalanobis.fit(model, once, validation={task: [pair] for task, pair in everything.items()})


def test_validation_data_of_a_task_that_was_not_fitted_are_refused():
    model, everything = float64_model(), data()
    with pytest.raises(InputError, match="validation data of task 2, which is not among the tasks fitted"):
        Mahalanobis.fit(model, {0: everything[0], 1: everything[1]}, validation={2: everything[2]})
    assert model.fitted == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shrinkage": (-1, 1)}, "shrinkage must be a number of 0 or more"),
        ({"times": 1.5}, "times must be a whole number"),
        ({"tukey": float("nan")}, "tukey must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"shrinkage": (0, 0), "layer": "4"}, "a feature never varies in class"),
    ],
)
def test_settings_out_of_range(settings, message):
    model = float64_model()
    with torch.no_grad():
        model.net[2].bias[3] = -1e3  # a dead unit
        model.net[2].weight[3] = 0
    with pytest.raises(InputError, match=message):
        FeCAM.fit(model, data(), **settings)


def test_tukey_s_transform():
    model, train = float64_model(), data()
    fitted = FeCAM.fit(model, train, tukey=0.5)
    f = features(model, train[1][0], 1)
    mine = np.sqrt(f)[train[1][1].numpy() == 1]
    assert_close(fitted.of_task[1].means[1], torch.tensor(mine.mean(0)), "statistics")
    with pytest.raises(InputError, match="power 0 takes features above 0"):
        FeCAM.fit(model, train, tukey=0)
    with pytest.raises(InputError, match="takes features of 0 or more"):
        FeCAM.fit(model, train, tukey=0.5, layer="0")


def test_labels_beyond_a_task_s_classes_are_refused():
    torch.manual_seed(0)
    model = hmf.HyperMask(network().double(), 2, classes=[2, 1]).eval()
    with pytest.raises(InputError, match="task 1 has 1 classes, and a label 1"):
        FeCAM.fit(model, data(tasks=2))


@pytest.mark.parametrize("room", [1, 5, 12, 31, 200])
def test_distances_are_those_of_any_number_at_a_time(monkeypatch, room):
    """Samples and classes are taken a few at a time, the last ones fewer than the others."""
    generator = torch.Generator().manual_seed(0)
    features, centres = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (7, 4))
    roots = torch.randn(4, 5, 5, generator=generator, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, 0.0, 1.0, 1.0], dtype=torch.float64).expand(4, 5)
    z = torch.einsum("cij,cbj->cbi", roots, features - centres[:, None])
    monkeypatch.setattr(gaussians, "_IN_CACHE", room)
    found = gaussians.squared_distances(features, centres, roots, signs)
    torch.testing.assert_close(found, (z.square() * signs[:, None]).sum(-1), rtol=1e-12, atol=1e-12)
