"""One run's settings: dataclasses, read from and written to TOML, changed by `key=value`."""

import dataclasses
import difflib
import functools
import hashlib
import json
import sys
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ..data.checks import check_whole
from ..errors import InputError
from ..extras import needed_for
from ..hypernet import HypernetConfig
from ..ops.reference import kept_rank
from ..optim import GRADIENTS
from ..regularizers import FIDELITIES
from .targets import TargetConfig


@dataclass(frozen=True)
class DataConfig:
    """scenario: a name of `data.SCENARIOS`; dir: where its files lie; tasks: the first k only (None: all);
    validation: training samples per task held out (None: the scenario's own number)."""

    scenario: str
    dir: str | None = None
    tasks: int | None = None
    validation: int | None = None


@dataclass(frozen=True)
class MethodConfig:
    """sparsity in percent; beta, lam: weights of output and weight drift; drift_norm 1 or 2; ramp: sparsity
    grows over the first task. See `HyperMask`."""

    sparsity: float = 0.0
    beta: float = 0.01
    lam: float = 0.01
    drift_norm: int = 1
    drift_masked: bool = True
    ramp: bool = True


@dataclass(frozen=True)
class TrainingConfig:
    """How each task is trained.

    Attributes:
        lr, batch_size: of Adam, which starts afresh with every task.
        iterations, epochs: length of a task, one of the two.
        keep: "last" model of a task, or the one of "best" validation accuracy, checked every `validate_every`
            iterations, at each epoch's end and at the last iteration.
        schedule: "constant", or "plateau": ReduceLROnPlateau on validation accuracy per epoch.
        log_every: iterations between log lines (the only host syncs of the loop).
        checkpoint_every: iterations between checkpoints within a task; 0 for one at each task's end only.
        evaluation_batch: samples per evaluation batch.
        precision: "float32", or "bf16" to train the target network under autocast.
        gradient: of the hypernetwork's output layer: "auto", "factored" or "dense"; see `optim.Adam`.
        cuda_graph: on a GPU, capture the training step and replay it.
    """

    lr: float = 1e-3
    batch_size: int = 128
    iterations: int | None = None
    epochs: int | None = None
    keep: str = "last"
    schedule: str = "constant"
    validate_every: int = 100
    log_every: int = 100
    checkpoint_every: int = 1000
    evaluation_batch: int = 1000
    precision: str = "float32"
    gradient: str = "auto"
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        if (self.iterations is None) == (self.epochs is None):
            raise InputError("training takes either iterations or epochs, one of the two")
        for name in ("iterations", "epochs", "batch_size", "validate_every", "log_every", "evaluation_batch"):
            if getattr(self, name) is not None:
                check_whole(f"training.{name}", getattr(self, name), 1)
        if not 0 < self.lr < float("inf"):
            raise InputError(f"training.lr must be a positive number, not {self.lr}")
        check_whole("training.checkpoint_every", self.checkpoint_every, 0)
        _choice("training.keep", self.keep, ("last", "best"))
        _choice("training.schedule", self.schedule, ("constant", "plateau"))
        _choice("training.precision", self.precision, ("float32", "bf16"))
        _choice("training.gradient", self.gradient, GRADIENTS)

    def length(self, samples: int) -> int:
        """Iterations of a task with that many training samples; an epoch's last, partial batch counts."""
        return self.iterations or (self.epochs or 0) * self.epoch_length(samples)

    def epoch_length(self, samples: int) -> int:
        return -(-samples // self.batch_size)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers; besides `title`, a name for people, which decides nothing."""

    data: DataConfig
    target: TargetConfig
    training: TrainingConfig
    hypernet: HypernetConfig = field(default_factory=HypernetConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    title: str = ""
    seed: int = 0
    fidelity: str = "default"

    def __post_init__(self) -> None:
        _choice("fidelity", self.fidelity, FIDELITIES)
        for name, text in (("title", self.title), ("data.dir", self.data.dir or "")):
            _storable(name, text)
        kept_rank(self.method.sparsity, 1)
        if self.training.gradient == "factored" and self.hypernet.chunk_size is not None:
            raise InputError("training.gradient = factored needs a dense hypernetwork: take dense or auto with chunks")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """From nested tables. Raises InputError on an unknown key, a missing one or a value of wrong type."""
        return _build(cls, values, "")

    @classmethod
    def from_toml(cls, text: str, source: str) -> "RunConfig":
        tomllib = _tomllib()
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{source} is not valid TOML: {error}") from error
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    @classmethod
    def load(cls, path: Path | str) -> "RunConfig":
        try:
            return cls.from_toml(Path(path).read_text(encoding="utf-8-sig"), str(path))  # Windows begins it with a mark
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read configuration {path}: {reason}") from error

    def to_dict(self) -> dict[str, Any]:
        """Nested tables without the keys that are None (TOML has no null)."""
        return _without_none(dataclasses.asdict(self))

    def to_toml(self) -> str:
        with needed_for("writing a configuration"):
            import tomli_w
        return tomli_w.dumps(self.to_dict())

    def digest(self) -> str:
        """SHA-256 of all settings but the title and where the data lie: equal for runs of equal numbers."""
        return dataclasses.replace(self, title="").digest_with_title()

    def digest_with_title(self) -> str:
        """The digest as version 0.1.0 wrote it into checkpoints."""
        values = dataclasses.replace(self, data=dataclasses.replace(self.data, dir=None)).to_dict()
        if not self.hypernet.by_tensor:
            values["hypernet"].pop("by_tensor", None)  # which came later, and is off for all runs before
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def with_values(self, assignments: dict[str, Any]) -> "RunConfig":
        """A copy with dotted keys replaced, such as {"training.lr": 0.01}; strings are read as TOML values.

        Setting one of training.iterations and training.epochs unsets the other.
        """
        values = self.to_dict()
        lengths = {"training.iterations", "training.epochs"}
        if len(lengths & assignments.keys()) == 1:
            (unset,) = lengths - assignments.keys()
            values["training"].pop(unset.removeprefix("training."), None)
        for key, value in assignments.items():
            *tables, last = key.split(".")
            table = values
            for name in tables:
                table = table.setdefault(name, {})
                if not isinstance(table, dict):
                    raise InputError(f"unknown setting {key!r}: {name} is not a table")
            table[last] = _parse(value) if isinstance(value, str) else value
        return self.from_dict(values)


def presets() -> dict[str, RunConfig]:
    """Name -> configuration of every preset, sorted by name."""
    folder = resources.files("hypermask_fast") / "presets"
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".toml")), key=lambda f: f.name)
    return {
        file.name.removesuffix(".toml"): RunConfig.from_toml(file.read_text(encoding="utf-8"), file.name)
        for file in files
    }


def load_preset(name: str) -> RunConfig:
    known = presets()
    if name not in known:
        raise InputError(f"unknown preset {name!r}{_closest(name, known)}; presets: {', '.join(known)}")
    return known[name]


@functools.cache
def _tomllib() -> types.ModuleType:
    """Python's own reader of TOML, or the same as a package for Python 3.10."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        with needed_for("reading a configuration"):
            import tomli as tomllib
    return tomllib


def _parse(text: str) -> Any:
    tomllib = _tomllib()
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where or 'the configuration'} must be a table, not {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            raise InputError(
                f"unknown setting {prefix + key!r}{_meant(prefix + key)}; "
                f"{where or 'the top level'} has {', '.join(fields)}"
            )
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f"setting {prefix + name!r} is missing")
    return cls(**{key: _typed(value, hints[key], prefix + key) for key, value in values.items()})


def _typed(value: Any, hint: Any, where: str) -> Any:
    """`value` as the field's type: integers pass for floats, lists become tuples; anything else is an error."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            if all(type(item) is typing.get_args(option)[0] for item in value):
                return tuple(value)
        elif type(value) is option:
            return value
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    kinds = [names.get(option, "a list of integers") for option in options if option is not type(None)]
    raise InputError(f"setting {where!r} must be {' or '.join(kinds)}, not {value!r}")


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, not {value!r}")


def _storable(name: str, text: str) -> None:
    """Raises InputError for bytes of a command line that are no text: config.toml is UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"setting {name!r} must be text in UTF-8, not {text!r}") from error


def _meant(key: str) -> str:
    """A hint at the setting that an unknown one stands for: with its table left out or another, or misspelt."""
    known = []
    for name, hint in typing.get_type_hints(RunConfig).items():
        inner = dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ()
        known += [name, *(f"{name}.{f.name}" for f in inner)]
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    return f" (did you mean {same[0]!r}?)" if same else _closest(key, known)


def _closest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
