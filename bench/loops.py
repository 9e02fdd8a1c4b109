"""What people do in a training loop, each by torch.optim.Adam and by ours: `python -m bench.loops` prints the table.

Every feature is a way to make a training step. It is run for 20 steps in each of three tasks, with an ordinary gradient
and torch.optim.Adam, with `hmf.optim.Adam`, and with the latter's `step_in_backward=True`, from the same start.
"""

import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

import hypermask_fast as hmf

from . import loop_features  # noqa: F401  fills FEATURES
from .loop import FEATURES, TASKS, Feature, Loop

STEPS = 20
DENSE, DEFAULT, IN_BACKWARD = "torch.optim.Adam", "hmf.optim.Adam", "step_in_backward=True"
OPTIMISERS = (DENSE, DEFAULT, IN_BACKWARD)


def small_model(dtype: torch.dtype = torch.float32, chunk_size: int | None = None) -> hmf.HyperMask:
    """Without batch norm, which gives a bias before it a gradient of nothing but rounding, and with a smooth drift."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    config = hmf.HypernetConfig(embedding=8, hidden=(12,), chunk_size=chunk_size)
    return hmf.HyperMask(net, TASKS, 20, config, beta=0.5, lam=0.02, drift_norm=2).to(dtype)


def make_optimiser(name: str, model: hmf.HyperMask, settings: dict[str, Any]) -> torch.optim.Optimizer:
    settings = {"lr": 1e-2, **settings}
    if name == DENSE:
        return torch.optim.Adam(model.parameters(), **settings)
    return hmf.optim.Adam(model, **settings, step_in_backward=name == IN_BACKWARD)


def run(what: Feature, name: str, dtype: torch.dtype = torch.float32, chunk_size: int | None = None) -> list[Tensor]:
    """The parameters after STEPS steps in each task. Raises what the loop raises."""
    model = small_model(dtype, chunk_size)
    generator = torch.Generator().manual_seed(0)
    loop = Loop(
        model,
        optimizer=torch.optim.SGD(model.parameters()),
        x=torch.randn(STEPS, 32, 8, generator=generator).to(dtype),
        y=torch.randint(2, (STEPS, 32), generator=generator),
    )
    for loop.task in range(TASKS):
        what.begin(loop)
        loop.optimizer = make_optimiser(name, loop.model, what.settings)
        what.after(loop)
        loop.model.begin_task(loop.task)
        for loop.step in range(STEPS):
            what.step(loop)
    return [p.detach() for p in loop.model.parameters()]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest |a - b| / |b| of any parameter; inf where one is not finite."""
    norms = [((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(found, expected, strict=True)]
    return max(norms) if all(torch.isfinite(torch.tensor(norms))) else float("inf")


def outcome(what: Feature, name: str, expected: list[Tensor]) -> str:
    """What the table says."""
    try:
        found = run(what, name)
    except hmf.InputError as error:
        return f"refused: {error}"
    return f"equal, {difference(found, expected):.0e}"


def main() -> None:
    warnings.simplefilter("ignore")
    print("| in the loop | " + " | ".join(OPTIMISERS) + " |\n|---|---|---|---|")
    notes: list[str] = []  # what refusals say, once each
    for name, what in FEATURES.items():
        expected = run(what, DENSE)
        cells = [outcome(what, ours, expected) for ours in (DEFAULT, IN_BACKWARD)]
        print(f"| {name} | the yardstick | {' | '.join(noted(cell, notes) for cell in cells)} |", flush=True)
    print("\n" + "\n".join(f"{i}. {note}" for i, note in enumerate(notes, start=1)))


def noted(cell: str, notes: list[str]) -> str:
    """A refusal as the number of its note, without the operation's name; anything else as it is."""
    refused, colon, note = cell.partition("refused: ")
    if not colon:
        return cell
    note = re.sub(r"^aten\.\S+: ", "", note)
    if note not in notes:
        notes.append(note)
    return f"{refused}refused: [{notes.index(note) + 1}]"


if __name__ == "__main__":
    main()
