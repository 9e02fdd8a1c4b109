"""The output layer: whose bias is used as it is, found by how the network is built, or by how it runs."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: PLC2701

from ..errors import InputError
from .scope import tensors_of
from .selection import Row, owners

_BY_INDEX = ("Embedding", "Index", "Gather")
_LONGEST_CHAIN = 6  # operations between a parameter and the layer that uses it, such as a transposition and a cast


def biases(net: nn.Module, table: Sequence[Row], heads: str | Iterable[str] | None) -> list[str]:
    """Names of the output layers' biases: of `heads`, or as far as the network's definition tells.

    Args:
        table: all parameters of the network.
        heads: patterns of the output layers' paths ("head", "heads.*"); None: that of the parameter defined last.

    Raises:
        InputError: a pattern that matches no module with parameters.
    """
    if heads is None:
        last = next((row.name for row in reversed(table) if row.layer), "")
        return [last] if _is_bias(last) else []
    paths = {row.name: row.name.rpartition(".")[0] for row in table}
    found = []
    for pattern in [heads] if isinstance(heads, str) or not isinstance(heads, Iterable) else heads:
        if not isinstance(pattern, str):
            raise InputError(f"heads takes patterns of layers' paths, such as 'head' or 'heads.*', not {pattern!r}")
        matching = [name for name, path in paths.items() if fnmatchcase(path, pattern)]
        if not matching:
            raise InputError(
                f"heads pattern {pattern!r} matches no layer; there are {', '.join(dict.fromkeys(paths.values()))}"
            )
        found += [name for name in matching if _is_bias(name)]
    return found


def is_plain_to_see(net: nn.Module) -> bool:
    """Whether the definition tells which layer runs last: an nn.Sequential that ends in a layer of PyTorch's own."""
    while type(net).forward is nn.Sequential.forward and len(list(net.children())) > 0:
        with_parameters = [child for child in net.children() if any(True for _ in child.parameters())]
        if not with_parameters:
            return False
        net = with_parameters[-1]
    return not list(net.children()) and type(net).__module__.startswith(("torch.nn.modules", "hypermask_fast"))


def biases_found(net: nn.Module, table: Sequence[Row], args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """Names of the output layers' biases, as one run of the network shows them; see `parameters_found`."""
    return list(filter(_is_bias, parameters_found(net, table, args, kwargs)))


def parameters_found(net: nn.Module, table: Sequence[Row], args: tuple, kwargs: dict[str, Any]) -> list[str]:
    """Names of the output layers' parameters, as one run of the network shows them.

    A layer is an output layer if its result reaches the network's output, and none that does so makes use of it. The
    run is on two samples where that can be cut, in evaluation mode, and leaves nothing behind.
    """
    parameters = dict(net.named_parameters())
    held = owners(net)
    floating = {name: p for name, p in parameters.items() if p.is_floating_point() and not p.is_inference()}
    # Copies: a network may change its parameters in place as it runs, as one that clamps its weights does.
    copies = {name: p.detach().clone() for name, p in parameters.items()}
    leaves = {name: copies[name].requires_grad_() for name in floating}
    layer = {row.name for row in table if row.layer} & set(leaves)
    modes = {module: module.training for module in net.modules()}
    devices = sorted({p.device for p in parameters.values() if p.device.type == "cuda"}, key=str)
    try:
        net.eval()
        # A compiled network would be a single node of the graph.
        eager = torch.compiler.set_stance("force_eager")
        with eager, torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            copied = {name: buffer.detach().clone() for name, buffer in net.named_buffers()}
            output = _run(lambda a, k: functional_call(net, {**copies, **copied}, a, k), args, kwargs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    by_id = {id(leaf): name for name, leaf in leaves.items()}
    reached = _nearest(output, by_id, layer)
    known = {
        f"{owner.path}.{owner.attribute}".lstrip("."): name for name, p in parameters.items() for owner in held[id(p)]
    }
    return [name for name in parameters if name in {known.get(r, r) for r in reached}]


def _run(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """On two samples, where all tensors have as many rows; on everything where that is not to be."""
    args, kwargs = tree_map_only(
        Tensor, lambda t: t.detach().clone() if t.is_inference() else t.detach(), (args, kwargs)
    )
    rows = {leaf.shape[0] if leaf.dim() else 0 for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    if len(rows) == 1 and min(rows) > 2:
        try:
            return function(*tree_map_only(Tensor, lambda t: t[:2], (args, kwargs)))
        except Exception:  # the first dimension is not one of samples
            pass
    return function(args, kwargs)


def _nearest(output: Any, by_id: dict[int, str], layer: set[str]) -> set[str]:
    """Parameters among `layer` that reach the output without another of them between."""
    pure: dict[Any, frozenset[str] | None] = {}  # node -> the parameters that alone it is made of; None: of more

    def leaves_of(node: Any, depth: int = 0) -> frozenset[str] | None:
        if depth > _LONGEST_CHAIN:
            return None
        if node in pure:
            return pure[node]
        variable = getattr(node, "variable", None)
        if variable is not None:
            name = by_id.get(id(variable))
            pure[node] = None if name is None else frozenset([name])
            return pure[node]
        below = [leaves_of(n, depth + 1) if n is not None else None for n, _ in node.next_functions]
        if node.name().startswith(_BY_INDEX):
            below = []  # a layer over integers, which leave no node of their own
        found = None if not below or None in below else frozenset().union(*(b for b in below if b is not None))
        pure[node] = found
        return found

    found: dict[Any, set[str]] = {}  # node of a layer -> its parameters

    def visit(first: list[Any], layers: bool) -> set[Any]:
        """All nodes below the first ones; with `layers`, down to the first layer on each way, which is noted."""
        seen, waiting = set(), list(first)
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if layers and node.name() == "CheckpointFunctionBackward":
                raise _hidden()
            below = [n for n, _ in node.next_functions if n is not None]
            if layers:
                here = set().union(*(names for names in map(leaves_of, below) if names)) & layer
                if here:
                    found[node] = here
                    continue
            waiting += below
        return seen

    results = [t.grad_fn for t in tensors_of(output) if t.grad_fn is not None]
    if not results:
        raise _hidden()
    visit(results, layers=True)
    # Where a layer's result is added to that of a later one (a residual connection), the later one is the output layer.
    earlier = {
        below for node in found for below in visit([n for n, _ in node.next_functions if n is not None], layers=False)
    }
    return set().union(*(names for node, names in found.items() if node not in earlier))


def _hidden() -> InputError:
    return InputError(
        "which layer is the output layer can't be seen from the network's gradient (as inside of "
        "torch.utils.checkpoint with use_reentrant=True): name it at construction, heads='...'"
    )


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"
