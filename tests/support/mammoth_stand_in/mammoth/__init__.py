"""A stand-in for Mammoth, which is on no package registry: of its interface what a model of others meets.

As in Mammoth 0.2.2: the optimizer is made anew for each task, evaluation puts `net` alone into evaluation mode and
tells the task where COMPATIBILITY has neither class-il nor general-continual, labels are absolute, and a checkpoint is
a state_dict from whose names "module." is removed.
"""

import argparse
import io

import torch
import torch.nn.functional as F
from torch import nn

MODELS, CHECKPOINTS = {}, []


def register_model(name):
    return lambda cls: MODELS.setdefault(name, cls)


class Dataset:
    """Three tasks of two classes, or with SETTING "domain-il" of all: class c has a feature of its own raised."""

    N_TASKS, N_CLASSES, WIDTH = 3, 6, 18

    def __init__(self, setting="class-il", per_task=2):
        self.SETTING, self.N_CLASSES_PER_TASK = setting, per_task

    def data(self, task, seed):
        drawn = torch.Generator().manual_seed(100 * seed + task)
        counts = [self.N_CLASSES_PER_TASK] * 3 if isinstance(self.N_CLASSES_PER_TASK, int) else self.N_CLASSES_PER_TASK
        first, count = (0, 6) if self.SETTING == "domain-il" else (sum(counts[:task]), counts[task])
        y = first + torch.arange(20 * count) % count
        x = torch.randn(len(y), self.WIDTH, generator=drawn)
        x[torch.arange(len(y)), y + (6 * task if self.SETTING == "domain-il" else 0)] += 5
        order = torch.randperm(len(y), generator=drawn)
        return x[order], y[order]


class ContinualModel(nn.Module):
    NAME, COMPATIBILITY = "", ()

    @staticmethod
    def get_parser(parser):
        return parser

    def __init__(self, backbone, loss, args, transform, dataset=None):
        super().__init__()
        self.net, self.loss, self.args, self.transform, self.dataset = backbone, loss, args, transform, dataset
        self.N_CLASSES, self.N_TASKS, self._current_task = dataset.N_CLASSES, dataset.N_TASKS, 0
        self.device, self.opt = torch.device("cpu"), self.get_optimizer()

    @property
    def current_task(self):
        return self._current_task

    def get_parameters(self):
        return self.net.parameters()

    def get_optimizer(self):
        return torch.optim.SGD(self.get_parameters(), lr=self.args.lr)

    def meta_begin_task(self, dataset):
        self.opt = self.get_optimizer()
        self.begin_task(dataset)

    def meta_end_task(self, dataset):
        self.end_task(dataset)
        self._current_task += 1


def load_runner(name, dataset, settings):
    cls = MODELS[name]
    parser = argparse.ArgumentParser()
    for argument, default in (("optimizer", "sgd"), ("lr", 0.1), ("optim_wd", 0.0), ("n_epochs", 1), ("batch_size", 8)):
        parser.add_argument(f"--{argument}", type=type(default), default=default)
    args = argparse.Namespace(**{**vars(cls.get_parser(parser).parse_args([])), **settings})
    data = dataset if isinstance(dataset, Dataset) else Dataset()
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(data.WIDTH, 20), nn.ReLU(), nn.Linear(20, data.N_CLASSES))
    return cls(backbone, F.cross_entropy, args, None, dataset=data), data


@torch.no_grad()
def evaluate(model, dataset, tasks):
    status = model.net.training
    model.net.eval()
    told = not {"class-il", "general-continual"} & set(model.COMPATIBILITY)
    accuracies = []
    for task in range(tasks):
        x, y = dataset.data(task, seed=1)
        outputs = model(x, task) if told else model(x)
        accuracies.append(float((outputs.argmax(1) == y).float().mean()))
    model.net.train(status)
    return accuracies


def train(model, dataset):
    rows = []
    for task in range(dataset.N_TASKS):
        model.net.train()
        model.meta_begin_task(dataset)
        x, y = dataset.data(task, seed=0)
        for epoch in range(model.args.n_epochs):
            for rows_of in torch.arange(len(x)).split(model.args.batch_size):
                loss = model.observe(x[rows_of], y[rows_of], x[rows_of], epoch=epoch)
                assert isinstance(loss, float) and loss == loss
        model.meta_end_task(dataset)
        rows.append(evaluate(model, dataset, task + 1))
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        CHECKPOINTS.append(file.getvalue())
        print(f"task {task}:", *(f"{100 * value:.1f}" for value in rows[-1]))
    return rows


def load_checkpoint(model, saved):
    state = torch.load(io.BytesIO(saved))
    model.load_state_dict({name.replace("module.", ""): value for name, value in state.items()})
