"""What a run is, in words that are made from its settings and so are true of it."""

from collections.abc import Callable

from ..data import SCENARIOS
from ..data.scenario import task_label
from .config import RunConfig
from .targets import TargetConfig

_NETWORKS: dict[str, Callable[[TargetConfig], str]] = {
    "mlp": lambda target: "-".join(["MLP", *map(str, target.hidden)]),
    "resnet20": lambda target: f"ResNet-20 of width {target.width}",
    "zenkenet": lambda target: "ZenkeNet",
}


def title(config: RunConfig) -> str:
    """ "split-digits, 2 tasks of 2 classes, MLP-100-100", after the run's own title where it has one."""
    own = f"{config.title}: " if config.title else ""
    return f"{own}{config.data.scenario}{_tasks(config)}, {_network(config.target)}"


def task_labels(config: RunConfig) -> list[str]:
    """ "task 1 (digits 2, 3)" of each of the run's tasks; none where the scenario is unknown, which will be refused."""
    known = SCENARIOS.get(config.data.scenario)
    names = known.names[: config.data.tasks] if known else ()
    return [task_label(number, name) for number, name in enumerate(names)]


def details(config: RunConfig) -> str:
    """The settings that a title leaves out and that are looked at first, seed and fidelity among them; one line."""
    method, training = config.method, config.training
    hypernet = "-".join(map(str, (config.hypernet.embedding, *config.hypernet.hidden)))
    length = f"{training.iterations} iterations" if training.iterations else f"{training.epochs} epochs"
    parts = [
        f"hypernetwork {hypernet}"
        + (f" in chunks of {config.hypernet.chunk_size}" if config.hypernet.chunk_size else ""),
        f"sparsity {method.sparsity:g} %",
        f"beta {method.beta:g}",
        f"lam {method.lam:g}",
        f"{length} of {training.batch_size} samples",
        f"lr {training.lr:g}",
        f"seed {config.seed}",
    ]
    return ", ".join([*parts, "official fidelity"] if config.fidelity == "official" else parts)


def _tasks(config: RunConfig) -> str:
    known = SCENARIOS.get(config.data.scenario)
    if known is None:
        return ""  # reading it will be refused
    tasks = known.tasks if config.data.tasks is None else config.data.tasks
    return f", {tasks} task{'' if tasks == 1 else 's'} of {known.num_classes} classes"


def _network(target: TargetConfig) -> str:
    return _NETWORKS.get(target.name, lambda _: target.name)(target)
