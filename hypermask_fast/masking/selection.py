"""Which parameters of a network are masked, which are shared by all tasks, which are per task, and why."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # noqa: PLC2701 # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd  # noqa: PLC2701 # pyright: ignore[reportPrivateUsage]
from torch.nn.parameter import is_lazy

from ..errors import InputError
from .access import is_attached

Rule = str | type | Callable[[str, nn.Parameter], bool]

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v")
# What is masked by default: these modules, their subclasses too, and of them these attributes.
_MASKED_OF: tuple[tuple[type, tuple[str, ...]], ...] = (
    (nn.Linear, ("weight", "bias")),
    (_ConvNd, ("weight", "bias")),
    (nn.Bilinear, ("weight", "bias")),
    (nn.Embedding, ("weight",)),
    (nn.EmbeddingBag, ("weight",)),
    (nn.MultiheadAttention, _ATTENTION),
    (nn.RNNBase, ("weight_*", "bias_*")),
    (nn.RNNCellBase, ("weight_*", "bias_*")),
)
_NORM = re.compile(r"(Norm|RMSNorm)(\dd)?$")
_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.quantizable")

MASKED, SHARED, PER_TASK = "masked", "shared", "per task"


@dataclass(frozen=True)
class Row:
    """One parameter of a network.

    Attributes:
        name, shape: as the network has them.
        kind: what is done with it: `MASKED`, `SHARED` or `PER_TASK`; why: in words.
        layer: whether it belongs to a layer that is masked unless a rule says otherwise.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    why: str
    layer: bool = False

    @property
    def entries(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Owner:
    """A module that holds a parameter, under which of its attributes."""

    module: nn.Module
    path: str
    attribute: str


def owners(net: nn.Module) -> dict[int, list[Owner]]:
    """By id of the Parameter: every module that holds it; more than one where parameters are tied."""
    found: dict[int, list[Owner]] = {}
    for path, module in net.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), []).append(Owner(module, path, attribute))
    return found


def rows(
    net: nn.Module,
    include: Rule | Iterable[Rule] | None = None,
    exclude: Rule | Iterable[Rule] | None = None,
    per_task: Rule | Iterable[Rule] | None = None,
) -> list[Row]:
    """Every parameter of `net` in the network's order, a tied one once.

    Args:
        include: what is masked, in place of the default. Patterns of parameter names ("blocks.*.weight"), types of
            modules, or predicates (name, parameter) -> bool. A normalisation's parameters are never masked.
        exclude: what is left shared by all tasks, in the same words.
        per_task: what each task gets a value of its own of, in the same words; "norm": all affine parameters of
            normalisations.

    Raises:
        InputError: not a network that can be masked, or a rule that matches nothing.
    """
    _check(net)
    held = owners(net)
    parameters = dict(net.named_parameters())
    normal = {name for name, p in parameters.items() if any(is_normalisation(o.module) for o in held[id(p)])}
    default = {name: _default(held[id(p)]) for name, p in parameters.items() if name not in normal}
    chosen = {name for name, why in default.items() if why is not None}
    if include is not None:
        chosen = _of_rules("include", include, parameters, held) - normal
        if not chosen:
            raise InputError("include matches normalisation parameters only, which are never masked (see per_task)")
    left = set() if exclude is None else _of_rules("exclude", exclude, parameters, held)
    own = _own(per_task, parameters, held, normal)
    table = []
    for name, parameter in parameters.items():
        if name in own:
            kind, why = PER_TASK, "per_task asks for it"
        elif name in chosen and name not in left:
            kind, why = MASKED, default.get(name) or "include asks for it"
        else:
            kind = SHARED
            why = _why_shared(name, held[id(parameter)], name in normal, name in left, include is not None)
        table.append(Row(name, tuple(parameter.shape), kind, why, default.get(name) is not None or name in chosen))
    for name, parameter in parameters.items():
        _check_parameter(name, parameter, name in chosen and name not in left)
    if not any(row.kind == MASKED for row in table):
        raise InputError(_nothing(chosen, include, exclude))
    return table


def _default(held: Sequence[Owner]) -> str | None:
    """Why a parameter is masked by default; None where it is not."""
    for owner in held:
        for kind, names in _MASKED_OF:
            if isinstance(owner.module, kind) and any(fnmatchcase(owner.attribute, name) for name in names):
                return f"{owner.attribute} of {type(owner.module).__name__}"
        if _is_hugging_face_conv1d(owner.module) and owner.attribute in ("weight", "bias"):
            return f"{owner.attribute} of {type(owner.module).__name__}"
    return None


def _is_hugging_face_conv1d(module: nn.Module) -> bool:
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def is_normalisation(module: nn.Module) -> bool:
    """Whether a module normalises: PyTorch's own and subclasses, and users' that are called ...Norm."""
    return any(_NORM.search(c.__name__) for c in type(module).__mro__[:-2])


def _why_shared(name: str, held: Sequence[Owner], normal: bool, left: bool, included: bool) -> str:
    if normal:
        return "a normalisation's"
    if left:
        return "exclude asks for it"
    for owner in held:
        if ".parametrizations." in f".{owner.path}.":
            return "what a parametrisation (weight_norm, spectral_norm) computes a weight from"
        if name.rpartition(".")[2] in ("weight_g", "weight_v", "weight_orig"):
            return "what a hook (weight_norm, spectral_norm, prune) computes a weight from"
    if included:
        return "include leaves it out"
    return f"{held[0].attribute} of {type(held[0].module).__name__}, not masked by default"


# -- rules ------------------------------------------------------------------------------------------------------------


def _own(
    per_task: Rule | Iterable[Rule] | None,
    parameters: dict[str, nn.Parameter],
    held: dict[int, list[Owner]],
    normal: set[str],
) -> set[str]:
    if per_task is None:
        return set()
    found: set[str] = set()
    for rule in _listed(per_task):
        if rule == "norm":
            if not normal:
                raise InputError("per_task='norm', but no normalisation of the network has parameters")
            found |= normal
        else:
            found |= _of_rules("per_task", [rule], parameters, held)
    return found


def _of_rules(
    which: str, rules: Rule | Iterable[Rule], parameters: dict[str, nn.Parameter], held: dict[int, list[Owner]]
) -> set[str]:
    found: set[str] = set()
    for rule in _listed(rules):
        matching = {name for name, p in parameters.items() if _matches(rule, name, p, held[id(p)], which)}
        if not matching:
            shown = f"pattern {rule!r}" if isinstance(rule, str) else getattr(rule, "__name__", repr(rule))
            names = list(parameters)
            some = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
            raise InputError(f"{which} {shown} matches none of the network's parameters {some}")
        found |= matching
    return found


def _listed(rules: Rule | Iterable[Rule]) -> list[Rule]:
    if isinstance(rules, (str, type)) or callable(rules) or not isinstance(rules, Iterable):
        return [rules]  # what is no rule at all is refused by `_matches`
    return list(rules)


def _matches(rule: Rule, name: str, parameter: nn.Parameter, held: Sequence[Owner], which: str) -> bool:
    if isinstance(rule, str):
        return any(fnmatchcase(n, rule) for n in {name, *(f"{o.path}.{o.attribute}".lstrip(".") for o in held)})
    if isinstance(rule, type):
        return any(isinstance(owner.module, rule) for owner in held)
    if callable(rule):
        return bool(rule(name, parameter))
    raise InputError(f"{which} takes patterns of names, types of modules or predicates, not {rule!r}")


# -- what can't be masked ---------------------------------------------------------------------------------------------


def _check(net: nn.Module) -> None:
    if not isinstance(net, nn.Module):
        raise InputError(f"the target network must be an nn.Module, not {net!r}")
    for path, module in net.named_modules():
        kind, name = type(module), path or "the network"
        if is_attached(module):
            raise InputError("the network is a HyperMask model's already: give each model a network of its own")
        if kind.__module__.startswith("torch.jit") or kind.__module__.startswith(_QUANTISED):
            raise InputError(
                f"{name} ({kind.__name__}) is scripted or quantised: it reads a copy of its weight, never W * m"
            )
        for attribute, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if is_lazy(value):
                raise InputError(
                    f"{name} has no {attribute} yet (a lazy module): pass one batch through the network first"
                )


def _check_parameter(name: str, parameter: nn.Parameter, masked: bool) -> None:
    if not masked:
        return
    if parameter.numel() == 0:
        raise InputError(f"parameter {name} is empty: a masked tensor needs at least one entry")
    if not parameter.is_floating_point():
        raise InputError(f"parameter {name} is {parameter.dtype}: a mask needs a floating point tensor (exclude it)")


def check_values(net: nn.Module) -> None:
    """Raises InputError for a network on the meta device, which has shapes but no values."""
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_meta:
            raise InputError(
                f"{name} is on the meta device and has no values: materialise the network first, "
                "net.to_empty(device=...) and then its values, such as by load_state_dict"
            )


def check_modules(net: nn.Module, masked: set[int]) -> None:
    """Raises InputError for a module whose kind of masked parameter can't be multiplied by a mask."""
    for path, module in net.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and id(module.weight) in masked:
            raise InputError(f"{path or 'the network'} has sparse gradients, which can't be masked: exclude it")
    _check_statistics(net)


def _check_statistics(net: nn.Module) -> None:
    owner: dict[int, str] = {}
    for path, module in net.named_modules():
        if isinstance(module, _NormBase):
            for name, buffer in module.named_buffers(recurse=False):
                if (other := owner.setdefault(id(buffer), path)) != path:
                    raise InputError(
                        f"{path} has its {name} together with {other}: running statistics are per task, which such "
                        "modules would no longer share (use one module in both places)"
                    )


def _nothing(chosen: set[str], include: object, exclude: object) -> str:
    if chosen or include is not None:
        return "the network has nothing to mask: include and exclude leave no parameter"
    return (
        "the network has nothing to mask: no weight or bias of a linear, convolution, embedding, attention or "
        "recurrent layer (include='...' names other parameters)"
    )


def summary(table: Sequence[Row]) -> str:
    """One line: how many parameters are left shared, and which modules they belong to; "" for none but what a
    rule leaves out and normalisations."""
    expected = ("a normalisation's", "exclude asks for it", "include leaves it out")
    shared = [row for row in table if row.kind == SHARED and row.why not in expected]
    if not shared:
        return ""
    modules = list(dict.fromkeys(row.name.rpartition(".")[0] or row.name for row in shared))
    some = ", ".join(modules[:8]) + (f", ... ({len(modules)} modules)" if len(modules) > 8 else "")
    entries = sum(row.entries for row in shared)
    return f"{len(shared)} parameters ({entries:,} entries) are shared by all tasks, not masked: those of {some}"


def printed(table: Sequence[Row]) -> str:
    """The table as text: name, shape, entries, what is done, why."""
    cells = [("name", "shape", "entries", "", "why")]
    cells += [(r.name, "x".join(map(str, r.shape)) or "scalar", f"{r.entries:,}", r.kind, r.why) for r in table]
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
