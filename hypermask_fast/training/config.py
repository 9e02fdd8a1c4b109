"""One run's settings, of the tables in `tables`: read from and written to TOML, changed by `key=value`."""

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
from typing import Annotated, Any

from .. import own_code
from ..checks import shown
from ..data import SCENARIOS
from ..errors import InputError
from ..extras import needed_for
from ..hypernet import HypernetConfig
from ..regularizers import FIDELITIES
from ..settings import LARGEST, Kind, OneOf, Range, Text, check_fields, kinds
from .checkpoint import MANIFEST
from .tables import DataConfig, MethodConfig, TrainingConfig
from .targets import TargetConfig

CONFIG = "config.toml"  # of a run's folder
LENGTHS = {"training.iterations", "training.epochs"}  # one of them is set
_VALIDATIONS = {"data.validation", "data.validation_per_class"}  # one of them at most


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers; besides `title`, a name for people, which decides nothing.

    Attributes:
        data: where the tasks come from.
        target: the network that is masked.
        training: how each task is trained.
        hypernet: the network that makes the masks.
        method: the method's strengths.
        title: a name of one's own, shown before what is made from the settings.
        seed: decides initial weights, the order of samples, augmentation, and what a scenario draws: permuted-mnist's
            permutations and tiny-imagenet's tasks.
        fidelity: whose method: "official" as the authors' published code does it; "default" with its slips mended.

    Raises:
        InputError: a value of another type or out of its range, or two that exclude each other.
    """

    data: DataConfig
    target: TargetConfig
    training: TrainingConfig
    hypernet: HypernetConfig = field(default_factory=HypernetConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    title: Annotated[str, Text()] = ""
    seed: Annotated[int, Range(0, LARGEST)] = 0
    fidelity: Annotated[str, OneOf(FIDELITIES)] = "default"

    def __post_init__(self) -> None:
        check_fields(self)
        for name, table in tables().items():
            if not isinstance(getattr(self, name), table):
                raise InputError(f"{name} must be a {table.__name__}, not {shown(getattr(self, name))}")
            check_fields(getattr(self, name), name)
        if self.data.validation is not None and self.data.validation_per_class is not None:
            raise InputError("data takes either validation or validation_per_class, one of the two")
        if self.training.gradient == "factored" and self.hypernet.chunk_size is not None:
            raise InputError("training.gradient = factored needs a dense hypernetwork: take dense or auto with chunks")
        if self.training.moments != "float32" and self.hypernet.chunk_size is not None:
            raise InputError(f"training.moments = {self.training.moments} needs a dense hypernetwork: no chunk_size")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """From nested tables. Raises InputError on an unknown key, a missing one or a value of wrong type."""
        return _build(cls, values, "")

    @classmethod
    def from_toml(cls, text: str, source: str) -> "RunConfig":
        tomllib = _tomllib()
        try:
            return cls.from_dict(tomllib.loads(text))
        except InputError as error:
            raise InputError(f"{source}: {error}") from error
        except (ValueError, RecursionError) as error:  # TOMLDecodeError, a number of thousands of digits, deep lists
            raise InputError(f"{source} is not valid TOML: {error}") from error

    @classmethod
    def load(cls, path: Path | str) -> "RunConfig":
        try:
            return cls.from_toml(Path(path).read_text(encoding="utf-8-sig"), str(path))  # Windows begins it with a mark
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read configuration {path}: {reason}") from error

    def settled(self) -> "RunConfig":
        """With the edition of its data, where there has been more than one: as a run's folder holds it."""
        edition = _edition(self.data)
        return self if edition == 1 else dataclasses.replace(self, data=dataclasses.replace(self.data, edition=edition))

    def to_dict(self) -> dict[str, Any]:
        """Nested tables without the keys that are None (TOML has no null)."""
        return _without_none(dataclasses.asdict(self))

    def to_toml(self) -> str:
        with needed_for("writing a configuration"):
            import tomli_w
        return tomli_w.dumps(self.to_dict())

    def digest(self) -> str:
        """SHA-256 of all settings that decide a number: equal for runs of equal numbers.

        Not of the title, of where the data and code of one's own lie, of how often the run logs and saves, of whether
        it inspects, of what processes share among each other, nor of how often it would validate where it never does.
        """
        usual, names = TrainingConfig(iterations=1), ["log_every", "checkpoint_every"]
        if not self.training.validates:
            names.append("validate_every")
        training = dataclasses.replace(self.training, **{name: getattr(usual, name) for name in names})
        return dataclasses.replace(self, title="", training=training).digest_with_title()

    def digests(self) -> tuple[str, ...]:
        """`digest`, and those of the same settings in checkpoints of earlier versions."""
        return self.digest(), self.digest_with_title(), dataclasses.replace(self, title="").digest_with_title()

    def digest_with_title(self) -> str:
        """The digest as version 0.1.0 wrote it into checkpoints."""
        data = dataclasses.replace(self.data, dir=None, scenario=own_code.portable(self.data.scenario), edition=None)
        target = dataclasses.replace(self.target, name=own_code.portable(self.target.name))
        values = dataclasses.replace(self, data=data, target=target).to_dict()
        if (edition := _edition(self.data)) > 1:
            values["data"]["edition"] = edition
        if not self.hypernet.by_tensor:
            values["hypernet"].pop("by_tensor", None)  # which came later, and is off for all runs before
        del values["training"]["shard"], values["training"]["inspect"]  # which decide no number
        if self.training.batch_norm == "synchronised":
            del values["training"]["batch_norm"]  # which came later, and decides none then
        if self.training.moments == "float32":
            del values["training"]["moments"]  # likewise
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def with_values(self, assignments: dict[str, Any]) -> "RunConfig":
        """A copy with dotted keys replaced, such as {"training.lr": 0.01}; strings are read as TOML values.

        Setting one of training.iterations and training.epochs unsets the other, and so do the two of data.validation.
        """
        values = self.to_dict()
        for either in (LENGTHS, _VALIDATIONS):
            if len(either & assignments.keys()) == 1:
                table, _, unset = next(iter(either - assignments.keys())).partition(".")
                values[table].pop(unset, None)
        for key, value in assignments.items():
            *tables, last = key.split(".")
            table = values
            for name in tables:
                table = table.setdefault(name, {})
                if not isinstance(table, dict):
                    raise InputError(f"unknown setting {key!r}: {name} is not a table")
            table[last] = _parse(value) if isinstance(value, str) else value
        return self.from_dict(values)


@functools.cache
def tables() -> dict[str, Any]:
    """Name -> dataclass of every table of a `RunConfig`."""
    return {name: hint for name, hint in typing.get_type_hints(RunConfig).items() if dataclasses.is_dataclass(hint)}


def _edition(data: DataConfig) -> int:
    """Of the scenario's data: as it is set, or the one that there is."""
    known = SCENARIOS.get(data.scenario)
    return data.edition or (known.edition if known else 1)


def stored_config(run_dir: Path) -> RunConfig:
    """The configuration that a run's folder holds, with the edition of its data: the first where it says none.

    Raises:
        InputError: it holds no run.
    """
    if not (run_dir / CONFIG).is_file():
        if (run_dir / MANIFEST).is_file():
            raise InputError(
                f"{run_dir} holds a Trainer's run (no {CONFIG}), whose network only Python knows: there "
                "hypermask_fast.training.run.load_model(folder, model) loads it"
            )
        raise InputError(f"{run_dir} holds no run (no {CONFIG}): give a folder that `hypermask-fast train` has made")
    config = RunConfig.load(run_dir / CONFIG)
    known = SCENARIOS.get(config.data.scenario)
    if config.data.edition is not None or known is None or known.edition == 1:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, edition=1))


def presets() -> dict[str, RunConfig]:
    """Name -> configuration of every preset, sorted by name."""
    folder = resources.files("hypermask_fast") / "presets"
    files = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".toml")),
        key=lambda file: file.name.removesuffix(".toml"),
    )
    return {
        file.name.removesuffix(".toml"): RunConfig.from_toml(file.read_text(encoding="utf-8"), file.name)
        for file in files
    }


def load_preset(name: str) -> RunConfig:
    known = presets()
    if name not in known:
        raise InputError(f"unknown preset {name!r}{_closest(name, known)}; presets: {', '.join(known)}")
    return known[name]


def setting_names() -> list[str]:
    """Dotted names of all settings and their tables."""
    names = []
    for entry in dataclasses.fields(RunConfig):
        inner = dataclasses.fields(tables()[entry.name]) if entry.name in tables() else ()
        names += [entry.name, *(f"{entry.name}.{f.name}" for f in inner)]
    return names


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
    except (ValueError, RecursionError):
        return text  # a bare word is a string, and what TOML can't hold is no other value


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where or 'the configuration'} must be a table, not {shown(values)}")
    plain = kinds(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            raise InputError(
                f"unknown setting {shown(prefix + key)}{meant(prefix + key)}; "
                f"{where or 'the top level'} has {', '.join(fields)}: `hypermask-fast settings"
                f"{f' {where}' if where else ''}` explains them"
            )
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise InputError(f"setting {prefix + name!r} is missing")
    return cls(
        **{
            key: _typed(value, plain[key], prefix + key) if key in plain else _build(tables()[key], value, prefix + key)
            for key, value in values.items()
        }
    )


def _typed(value: Any, kind: Kind, where: str) -> Any:
    """`value` as the field's type: integers pass for floats, lists become tuples; anything else is an error."""
    if kind.type is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError as error:
            raise InputError(f"{where} must be {kind.text}, not {shown(value)}") from error
    if kind.type is tuple and isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
        value = tuple(value)
    if type(value) is not kind.type:
        names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
        must = names.get(kind.type, "a list of integers")
        raise InputError(f"setting {where!r} must be {must}, not {shown(value)}")
    kind.check(where, value)
    return value


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value


def meant(key: str) -> str:
    """A hint at the setting that an unknown one stands for: with its table left out or another, or misspelt."""
    known = setting_names()
    last = key.rpartition(".")[2]
    same = [name for name in known if name.rpartition(".")[2] == last]
    return f" (did you mean {same[0]!r}?)" if same else _closest(key, known)


def _closest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
