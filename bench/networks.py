"""`python -m bench.networks [--only NAME] [--out docs/networks.md]`: which networks work, check by check, as a table.

Every cell is run on the CPU with random weights: "passes", "refused: why" where the library says in one line why not,
or what fails.
"""

import argparse
import copy
import itertools
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters  # noqa: PLC2701
from torch.func import functional_call
from torch.utils._pytree import tree_leaves  # noqa: PLC2701

import hypermask_fast as hmf
from hypermask_fast import InputError
from hypermask_fast.extras import needed_for

from .zoo import ZOO, Entry

PASSES = "passes"
TASK, TASKS, SAMPLES = 1, 4, 4
_WITHIN = 2e-5  # of the largest entry: a network's roundings in float32 add up


class Failed(Exception):
    """A check's result is not the definition's; the message says by how much."""


def tensors(output: Any) -> list[Tensor]:
    """The floating point tensors of what a network returns; a cache of keys and values is none of them."""
    kept = {k: v for k, v in output.items() if "key_values" not in k} if isinstance(output, dict) else output
    return [leaf for leaf in tree_leaves(kept) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def agree(found: Any, expected: Any, what: str, within: float = _WITHIN) -> None:
    """Raises Failed where the tensors are not the same but for rounding."""
    ours, theirs = tensors(found), tensors(expected)
    if len(ours) != len(theirs) or not theirs:
        raise Failed(f"{what}: {len(ours)} tensors, not {len(theirs)}")
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            raise Failed(f"{what}: shape {tuple(a.shape)}, not {tuple(b.shape)}")
        if not a.numel():
            continue
        error = (a - b).detach().abs().max().item()
        if not error <= within * max(b.detach().abs().max().item(), 1e-3):
            raise Failed(f"{what}: off by {error:.1e}")


class Subject:
    """One network of the zoo under the checks; each check has a model of its own."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def model(self, net: nn.Module | None = None) -> hmf.HyperMask:
        torch.manual_seed(0)
        net = self.entry.build() if net is None else net
        model = hmf.HyperMask(net, TASKS, 30, hmf.HypernetConfig(embedding=6, hidden=(8,))).eval()
        self.pass_(model, 0)  # finds the output layer
        return model

    def plain(self) -> nn.Module:
        """The same network, unmasked."""
        torch.manual_seed(0)
        return self.entry.build().eval()

    def pass_(self, function: Callable, *task: Any, samples: int = SAMPLES, seed: int = 1) -> Any:
        torch.manual_seed(seed)
        args, kwargs = self.entry.inputs(samples)
        if task:
            kwargs["task"] = task[0]
        return function(*args, **kwargs)

    def defined(self, model: hmf.HyperMask, **how: Any) -> Any:
        """The pass by functional_call with W * m."""
        masks, plain = model.mask(TASK).masks(), self.plain()
        state = {
            segment.name: weight * masks[segment.name] if segment.selected else weight
            for segment, weight in zip(model.layout.segments, model.weights(), strict=True)
        }
        return self.pass_(lambda *a, **k: functional_call(plain, state, a, k), **how)


def loss_of(output: Any) -> Tensor:
    return torch.stack([t.square().mean() for t in tensors(output)]).sum()


# -- checks -----------------------------------------------------------------------------------------------------------


def masked(subject: Subject) -> str:
    model = subject.model()
    count = sum(parameter.numel() for parameter in subject.plain().parameters())
    return f"{model.layout.size:,} of {count:,}"


def forward(subject: Subject) -> None:
    model = subject.model()
    agree(subject.pass_(model, TASK), subject.defined(model), "output")
    with torch.no_grad():
        agree(subject.pass_(model, TASK), subject.defined(model), "output without gradients")


def gradients(subject: Subject) -> None:
    model = subject.model()
    parameters = [*model.weights(), *model.hypernet.parameters()]
    found = [
        torch.autograd.grad(loss_of(y), parameters, allow_unused=True, materialize_grads=True)
        for y in (subject.pass_(model, TASK), subject.defined(model))
    ]
    largest = max(g.abs().max().item() for g in found[1])
    for ours, theirs in zip(*found, strict=True):
        if not (ours - theirs).abs().max().item() <= _WITHIN * largest:
            raise Failed(f"a gradient is off by {(ours - theirs).abs().max().item() / largest:.1e}")


@torch.no_grad()
def export(subject: Subject) -> None:
    model = subject.model()
    expected, plain = subject.defined(model), model.export(TASK)
    agree(subject.pass_(plain), expected, "exported network")
    fresh = subject.plain()
    fresh.load_state_dict(plain.state_dict())
    agree(subject.pass_(fresh), expected, "its state_dict in a fresh network")


@torch.no_grad()
def mixed(subject: Subject) -> None:
    model, tasks = subject.model(), torch.tensor([2, 0, 1, 0])
    found = subject.pass_(model, tasks)
    for task in range(TASKS):
        rows = (tasks == task).nonzero()[:, 0]
        alone = subject.pass_(model, task)
        agree([t[rows] for t in tensors(found)], [t[rows] for t in tensors(alone)], "a batch of several tasks")
    every = subject.pass_(model.forward_all_tasks)
    agree([t[TASK] for t in tensors(every)], subject.pass_(model, TASK), "every task over a batch")


@torch.no_grad()
def state_dict(subject: Subject) -> None:
    model, other = subject.model(), subject.model()
    expected = subject.pass_(model, TASK)
    for parameter in other.parameters():
        parameter.add_(1.0)
    other.load_state_dict(model.state_dict())
    agree(subject.pass_(other, TASK), expected, "state_dict")
    agree(subject.pass_(copy.deepcopy(model), TASK), expected, "copy")


def one_pass(subject: Subject) -> None:
    """Two steps in each of two tasks, the output drift included, in both modes: as with an ordinary gradient."""
    results = []
    for mode in ("ordinary", "default", "in backward"):
        torch.manual_seed(0)
        # No thresholds, and no norm of what has hardly moved: rounding would decide there.
        config = hmf.HypernetConfig(embedding=6, hidden=(8,))
        model = hmf.HyperMask(subject.entry.build(), TASKS, 0, config, lam=0).train()
        subject.pass_(model, 0)  # finds the output layer
        # A step with so large an eps is in proportion to its gradient; else one that is 0 but for rounding turns it.
        settings = {"lr": 1e-4, "eps": 1e-2}
        if mode == "ordinary":
            optimizer = torch.optim.Adam(model.parameters(), **settings, fused=True)
        else:
            optimizer = hmf.optim.Adam(model, **settings, step_in_backward=mode == "in backward")
        for task, _ in itertools.product(range(2), range(2)):
            torch.manual_seed(5)
            optimizer.zero_grad()
            mask = model.mask(task)
            (loss_of(subject.pass_(model, mask, samples=6)) + model.regularizer(mask)).backward()
            optimizer.step()
        results.append([*model.weights(), *model.hypernet.parameters()])
    for found in results[1:]:
        steps = [(a - b).detach().abs().max().item() for a, b in zip(results[0], found, strict=True)]
        if not max(steps) <= 1e-4 * 1e-2:
            raise Failed(f"parameters are {max(steps):.1e} from those of an ordinary gradient")


@torch.no_grad()
def compiled(subject: Subject) -> str | None:
    """After wrapping, in one graph for all tasks; then a network that was compiled before it was wrapped."""
    torch.compiler.reset()
    model = subject.model()
    try:
        whole = torch.compile(model, fullgraph=True, backend="aot_eager")
        agree(subject.pass_(whole, torch.tensor(TASK)), subject.pass_(model, TASK), "compiled")
        note = None
    except (Failed, InputError):
        raise
    except Exception as error:
        torch.compiler.reset()
        whole = torch.compile(model, backend="aot_eager")
        agree(subject.pass_(whole, torch.tensor(TASK)), subject.pass_(model, TASK), "compiled")
        note = f"passes with graph breaks ({first_line(error)})"
    counters.clear()
    agree(subject.pass_(whole, torch.tensor(2)), subject.pass_(model, 2), "compiled, another task")
    if counters["stats"].get("unique_graphs", 0):
        raise Failed("another task is compiled anew")
    torch.compiler.reset()
    before = subject.model(torch.compile(subject.plain(), backend="aot_eager"))
    before.hypernet.load_state_dict(model.hypernet.state_dict())
    for task in range(2):  # the first pass, in which it is noted what the network reads, has a graph of its own
        agree(subject.pass_(before, task), subject.pass_(model, task), "compiled before wrapping")
    counters.clear()
    for task in range(2, TASKS):
        agree(subject.pass_(before, task), subject.pass_(model, task), "compiled before wrapping, another task")
    if counters["stats"].get("unique_graphs", 0):
        raise Failed("compiled before wrapping, another task is compiled anew")
    return note


@torch.no_grad()
def pt2(subject: Subject) -> None:
    model = subject.model()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        args, kwargs = subject.entry.inputs(SAMPLES)
        path = model.export(TASK, "pt2", Path(folder) / "net.pt2", args, kwargs)
        program = torch.export.load(path).module()
    for samples in (SAMPLES, SAMPLES + 3):
        agree(
            subject.pass_(program, samples=samples), subject.pass_(model, TASK, samples=samples), f"{samples} samples"
        )


@torch.no_grad()
def onnx(subject: Subject) -> None:
    with needed_for("running ONNX", "test"):
        import onnxruntime  # pyright: ignore
    model = subject.model()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(1)
        args, kwargs = subject.entry.inputs(SAMPLES)
        path = model.export(TASK, "onnx", Path(folder) / "net.onnx", args, kwargs)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for samples in (SAMPLES, SAMPLES + 3):
        torch.manual_seed(1)
        given = [leaf for leaf in tree_leaves(subject.entry.inputs(samples)) if isinstance(leaf, Tensor)]
        names = [entry.name for entry in session.get_inputs()]
        found = session.run(None, {name: value.numpy() for name, value in zip(names, given, strict=True)})
        expected = tensors(subject.pass_(model, TASK, samples=samples))
        agree([torch.from_numpy(y) for y in found][: len(expected)], expected, f"{samples} samples", 1e-4)


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "masked parameters": masked,
    "forward": forward,
    "every gradient": gradients,
    "export": export,
    "mixed batch": mixed,
    "state_dict": state_dict,
    "one-pass Adam": one_pass,
    "torch.compile": compiled,
    ".pt2": pt2,
    "ONNX": onnx,
}


def cell(entry: Entry, check: Callable[[Subject], str | None]) -> str:
    """What one check says."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check(Subject(entry)) or PASSES
    except InputError as error:
        return f"refused: {first_line(error)}"
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return f"fails: {first_line(error)}"


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def row(name: str, checks: list[str] | None = None) -> dict[str, str]:
    return {check: cell(ZOO[name], CHECKS[check]) for check in checks or CHECKS}


_HEADER = """# Networks that were checked

This page says which kinds of network can be masked, and what was checked of each. The table is made by
`python -m bench.networks`, on the CPU, with random weights and small configurations. The networks are in
`bench/zoo.py`. Those of Hugging Face come from `transformers`; GPT-2, Llama and T5 have `use_cache=False`, because
PyTorch exports no cache of keys and values. "Passes" means that the numbers are, to rounding, those that
`torch.func.functional_call` gives with W * m in place of W.

| check | what is compared |
|---|---|
| masked parameters | no check: how many entries have a mask by default; all tasks share the others |
| forward | the output in evaluation mode, with and without gradients |
| every gradient | those of all masked parameters and of the hypernetwork |
| export | the exported network, and its state_dict in a fresh network |
| mixed batch | a batch of several tasks, and every task over one batch |
| state_dict | a model that has loaded it, and a copy of the model |
| one-pass Adam | four steps over two tasks with `optim.Adam`, against the same steps on an ordinary gradient |
| torch.compile | with `fullgraph=True` (the task a tensor), and compiled before it is masked; no task compiles anew |
| .pt2, ONNX | the file, loaded without this library, for two sizes of batch |

"""


def table(rows: dict[str, dict[str, str]]) -> str:
    """As Markdown; what is longer than a cell can hold is told below."""
    notes: list[str] = []

    def short(value: str) -> str:
        if len(value) <= 24:
            return value
        if value not in notes:
            notes.append(value)
        return f"{value.partition(':')[0].partition(' (')[0]} [{notes.index(value) + 1}]"

    lines = ["| network | " + " | ".join(CHECKS) + " |", "|---" * (len(CHECKS) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(short(cells[check]) for check in CHECKS) + " |" for name, cells in rows.items()
    ]
    told = "".join(f"\n{number}. {note}" for number, note in enumerate(notes, 1))
    versions = f"PyTorch {torch.__version__}"
    return f"{_HEADER}" + "\n".join(lines) + (f"\n{told}\n" if told else "\n") + f"\nMade with {versions}.\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.networks", description=__doc__)
    parser.add_argument("--only", action="append", choices=ZOO, help="this network; may be repeated")
    parser.add_argument("--check", action="append", choices=CHECKS, help="this check; may be repeated")
    parser.add_argument("--out", type=Path, help="write the table there (needs all networks and checks)")
    arguments = parser.parse_args(argv)
    if arguments.out and (arguments.only or arguments.check):
        parser.error("--out needs all networks and checks")
    rows = {}
    for name in arguments.only or ZOO:
        rows[name] = row(name, arguments.check)
        print(name, *(f"{check}: {value}" for check, value in rows[name].items()), sep="\n    ", flush=True)
    if arguments.out:
        arguments.out.write_text(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
