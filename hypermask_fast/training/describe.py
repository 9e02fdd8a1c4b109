"""What a run is, in words that are made from its settings and so are true of it."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import nn

from ..data import SCENARIOS, Scenario
from ..data.folders import IMAGES
from ..data.scenario import task_label
from ..hypernet import HypernetConfig
from ..model import HyperMask
from ..own_code import short
from .config import RunConfig, TrainingConfig
from .targets import TargetConfig


class About(NamedTuple):
    """What reports say of a run: title and details, a line each; seed; fidelity."""

    title: str
    details: str
    seed: int
    fidelity: str


_NETWORKS: dict[str, Callable[[TargetConfig], str]] = {
    "mlp": lambda target: "-".join(["MLP", *map(str, target.hidden)]),
    "resnet20": lambda target: f"ResNet-20 of width {target.width}",
    "zenkenet": lambda target: "ZenkeNet",
}


def title(config: RunConfig) -> str:
    """ "split-digits, 2 tasks of 2 classes, MLP-100-100", after the run's own title where it has one."""
    own = f"{config.title}: " if config.title else ""
    return f"{own}{short(config.data.scenario)}{_tasks(config)}, {_network(config.target)}"


def scenario_name(config: RunConfig) -> str:
    """What the data are, for telling one scenario from another: of images, with the fingerprint of their folder."""
    data = config.data
    known_by_content = data.scenario == IMAGES and data.fingerprint is not None
    return f"{IMAGES} {data.fingerprint}" if known_by_content else short(data.scenario)


def task_labels(config: RunConfig) -> list[str]:
    """ "task 1 (digits 2, 3)" of each of the run's tasks; none where the scenario is unknown, which will be refused."""
    return [task_label(number, name) for number, name in enumerate(task_names(config))]


def task_names(config: RunConfig) -> tuple[str, ...]:
    """ "digits 2, 3" of each of the run's tasks; "" of data that are no longer there; none of an unknown scenario."""
    known = SCENARIOS.get(config.data.scenario)
    if known is None:
        return ()
    names = known.task_names(config.seed)[: config.data.tasks]
    return names if config.data.edition in (None, known.edition) else ("",) * len(names)


def details(config: RunConfig, seeds: Sequence[int] | None = None) -> str:
    """The settings that a title leaves out and that are looked at first, seed and fidelity among them; one line.

    seeds: of several runs of one configuration.
    """
    method = config.method
    seeds = [config.seed] if seeds is None else seeds
    return _details(config.hypernet, method.sparsity, method.beta, method.lam, config.training, seeds, config.fidelity)


def about(config: RunConfig) -> About:
    """What there is to say of a run by configuration."""
    return About(title(config), details(config), config.seed, config.fidelity)


def about_training(model: HyperMask, scenario: Scenario, training: TrainingConfig, seed: int) -> About:
    """The same of a model of one's own: "mine, 2 tasks of 3 classes, Sequential"."""
    hypernet, drift = model.hypernet, model.drift
    name = f"{scenario.name}{_task_words(scenario.classes)}, {type(model.net).__name__}"
    shape = HypernetConfig(
        hypernet.embeddings[0].numel(),
        tuple(layer.out_features for layer in hypernet.trunk if isinstance(layer, nn.Linear)),
        None if hypernet.factored else hypernet.output.out_features,
    )
    words = _details(shape, model.sparsity, drift.beta, drift.lam, training, [seed], drift.fidelity)
    return About(name, words, seed, drift.fidelity)


def _details(
    hypernet: HypernetConfig,
    sparsity: float,
    beta: float,
    lam: float,
    training: TrainingConfig,
    seeds: Sequence[int],
    fidelity: str,
) -> str:
    widths = "-".join(map(str, (hypernet.embedding, *hypernet.hidden)))
    length = f"{training.iterations} iterations" if training.iterations else f"{training.epochs} epochs"
    parts = [
        f"hypernetwork {widths}" + (f" in chunks of {hypernet.chunk_size}" if hypernet.chunk_size else ""),
        f"sparsity {sparsity:g} %",
        f"beta {beta:g}",
        f"lam {lam:g}",
        f"{length} of {training.batch_size} samples",
        f"lr {training.lr:g}",
        *([f"output drift of {training.drift_tasks} drawn tasks"] if training.drift_tasks else []),
        seed_words(seeds),
    ]
    return ", ".join([*parts, "official fidelity"] if fidelity == "official" else parts)


def seed_words(seeds: Sequence[int]) -> str:
    """ "seed 3", "seeds 0 to 4", "seeds 0, 2, 7"."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    in_turn = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"seeds {seeds[0]} to {seeds[-1]}" if in_turn else f"seeds {', '.join(map(str, seeds))}"


def _tasks(config: RunConfig) -> str:
    known = SCENARIOS.get(config.data.scenario)
    if known is None:  # the user's own; how many classes it has only its data say
        tasks = config.data.tasks
        return "" if tasks is None else f", {tasks} task{'' if tasks == 1 else 's'}"
    return _task_words(known.classes[: config.data.tasks])


def _task_words(classes: Sequence[int]) -> str:
    """ ", 5 tasks of 20 classes"; ", 6 tasks of 50 + 5 x 10 classes" where they differ in it."""
    runs = [(each, len(list(run))) for each, run in groupby(classes)]
    sizes = " + ".join(str(each) if run == 1 or len(runs) == 1 else f"{run} x {each}" for each, run in runs)
    if len(runs) > 4:
        sizes = f"{min(classes)} to {max(classes)}"
    return f", {len(classes)} task{'' if len(classes) == 1 else 's'} of {sizes} classes"


def _network(target: TargetConfig) -> str:
    return _NETWORKS.get(target.name, lambda _: short(target.name))(target)
