"""Several runs of one experiment: the seeds and settings that are asked for, as one planned run per folder."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from ..errors import InputError
from ..settings import LARGEST
from .config import LENGTHS, RunConfig
from .targets import check_name

MOST = 1000  # runs of one command
_SEEDS = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._=,+\[\]-]+")
_OF_THE_TASKS = (
    *("data.scenario", "data.tasks", "data.classes_per_task"),
    *("data.dir", "data.edition", "data.fingerprint", "target.fingerprint"),  # what data and code are, not a choice
)
_PAIRS = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class Planned:
    """One run of several.

    Attributes:
        name: its folder below that of all, such as "seed-3" or "method.beta=0.1/seed-3".
        settings: what it differs in from the others, dotted keys and values as text, the seed among them.
        config: its configuration.
    """

    name: str
    settings: dict[str, str]
    config: RunConfig


def seeds(text: str) -> list[int]:
    """ "0-4", "0,3,7" or "0-2,5" as numbers, in that order.

    Raises:
        InputError: something else, a range that is reversed, a seed twice, or more than `MOST`.
    """
    found: list[int] = []
    for part in text.split(","):
        match = _SEEDS.fullmatch(part.strip())
        if match is None:
            raise InputError(f"--seeds takes whole numbers and ranges of them, such as 0-4 or 0,3,7, not {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InputError(
                f"--seeds {text}: the range {part.strip()} is empty; it goes from low to high, {last}-{first}"
            )
        if last > LARGEST:
            raise InputError(f"--seeds {text}: a seed must be at most {LARGEST}")
        if len(found) + last - first >= MOST:
            raise InputError(f"--seeds {text}: at most {MOST} runs at once")
        found += range(first, last + 1)
    for seed in found:
        if found.count(seed) > 1:
            raise InputError(f"--seeds {text}: seed {seed} is named twice")
    return found


def grid(words: Sequence[str]) -> dict[str, list[str]]:
    """["method.beta=0.01,0.1", ...] as the values of each setting, as text; commas within brackets and quotes stay.

    Raises:
        InputError: not of that form, an empty value, or a setting twice.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        key, equals, values = word.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InputError(f"--grid takes key=value,value,..., such as method.beta=0.01,0.1, not {word!r}")
        if key in _OF_THE_TASKS:
            raise InputError(f"--grid {word}: runs of different tasks can't be summed up: train them one by one")
        if key == "seed":
            raise InputError(f"--grid {word}: several seeds are asked for by --seeds")
        if key in found:
            raise InputError(f"--grid names {key} twice: give all of its values at once")
        found[key] = [value.strip() for value in _split(values)]
        if not all(found[key]):
            raise InputError(f"--grid {word}: a value is empty")
        for value in found[key]:
            if found[key].count(value) > 1:
                raise InputError(f"--grid {word}: {value} is named twice")
    return found


def planned(base: RunConfig, numbers: Sequence[int] | None, values: dict[str, list[str]]) -> list[Planned]:
    """A run for each combination of the grid's values and each seed.

    Args:
        base: what all of them share.
        numbers: seeds; None: the base's own, without a folder for it.
        values: see `grid`.

    Raises:
        InputError: a setting that there is not or a value that it can't have; two runs that would be the same; more
            than `MOST` runs.
    """
    count = len(numbers or [0])
    for choices in values.values():
        count *= len(choices)
    if count > MOST:
        raise InputError(f"{count} runs are asked for: at most {MOST} at once")
    if len(LENGTHS & values.keys()) == len(LENGTHS):
        raise InputError("--grid takes training.iterations or training.epochs, one of the two")
    runs: list[Planned] = []
    for combination in product(*values.values()):
        settings = dict(zip(values, combination, strict=True))
        config = base.with_values(settings)
        check_name(config.target)
        folder = _NOT_IN_A_NAME.sub("_", ",".join(f"{key}={value}" for key, value in settings.items()))
        for seed in [None] if numbers is None else numbers:
            name = "/".join(part for part in (folder, "" if seed is None else f"seed-{seed}") if part)
            own = settings if seed is None else {**settings, "seed": str(seed)}
            runs.append(Planned(name, own, config if seed is None else config.with_values({"seed": seed})))
    _check_different(runs)
    return runs


def _check_different(runs: Sequence[Planned]) -> None:
    """Raises InputError where two of them would be the same run, or have the same folder."""
    by_digest: dict[str, Planned] = {}
    by_name: dict[str, Planned] = {}
    for run in runs:
        same = by_digest.setdefault(run.config.digest(), run)
        if same is not run:
            pairs = zip(same.settings.items(), run.settings.items(), strict=True)
            differ = [f"{key}={a} and {key}={b}" for (key, a), (_, b) in pairs if a != b]
            raise InputError(f"--grid: {', '.join(differ)} give the same numbers, so their runs would be the same")
        if (other := by_name.setdefault(run.name.casefold(), run)) is not run:
            raise InputError(f"--grid: {other.settings} and {run.settings} would have the same folder, {run.name}")
        if max(map(len, run.name.split("/"))) > 200:
            raise InputError(f"--grid: the name of a folder would be too long: {run.name[:60]}...")


def _split(text: str) -> list[str]:
    """At commas that are outside of brackets, braces and quotes."""
    parts, closing, quote = [""], [], ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in _PAIRS:
            closing.append(_PAIRS[letter])
        elif closing and letter == closing[-1]:
            closing.pop()
        elif letter == "," and not closing:
            parts.append("")
            continue
        parts[-1] += letter
    return parts
