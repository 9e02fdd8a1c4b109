"""Whole training steps: the library and its peers on one experiment, from the same initial values."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hypermask_fast import threads
from hypermask_fast.training.memory import tune_allocator

from .case import OURS, Case, Unavailable
from .experiments import Experiment, Piece, fill, initial_blocks, masked_names, shared_parameters, whole
from .gate import Sketch, sketch

ANY_LOOP = f"{OURS} in any loop"  # hmf.optim.Adam without step_in_backward
CPU_CONTENDERS = (OURS, "hypnettorch", "batched torch", "torch.compile", "plain network", ANY_LOOP)
CUDA_CONTENDERS = (
    *("ours captured", OURS, "batched torch captured", "batched torch", "torch.compile", "plain network"),
    ANY_LOOP,
)
BETA1, EPS = 0.9, 1e-8  # Adam's
# As shipped, the library is what its command line ships, the way its threads wait included. Under "tuned" this changes
# nothing: the environment decides, for its peers as well.
OWN_ALLOCATOR = "hypermask_fast.training.memory.tune_allocator()"


def cases(experiment: Experiment, device: torch.device) -> list[Case]:
    """One case per task index."""
    contenders = CUDA_CONTENDERS if device.type == "cuda" else CPU_CONTENDERS
    return [
        Case(
            name=f"{experiment.name}/task{task}",
            experiment=experiment.name,
            task=task,
            shapes=_shapes(experiment),
            contenders=contenders,
            build=lambda contender, device, task=task: build(experiment, task, contender, device),
            floor=lambda task=task: experiment.floor(task),
            tolerance=tolerance(experiment, device, task),
            reference=lambda contender: "reference plain" if contender == "plain network" else "reference",
            isolated=True,
            memory=lambda contender: memory(experiment, contender),
            allocator=lambda contender: OWN_ALLOCATOR if contender.startswith(OURS) else "",
            environment=lambda contender: threads.WAITING if contender.startswith(OURS) else {},
        )
        for task in experiment.at
    ]


def _shapes(experiment: Experiment) -> str:
    hyper = experiment.config.hypernet
    size = experiment.layout().size
    layer = f"{hyper.chunk_size} x {hyper.hidden[-1]}" if hyper.chunk_size else f"{size} x {hyper.hidden[-1]}"
    return f"N {size}, output layer {layer}, batch {experiment.batch}, {experiment.tasks} tasks"


def tolerance(experiment: Experiment, device: torch.device, task: int) -> Callable[[str], float]:
    """Float32 rounding, measured with room; where entries are selected, a few at the threshold's edge fall either way.
    In the first task nothing is added to the cross-entropy's gradient, in which units at ReLU's edge show (up to 3e-3,
    PyTorch's own the same).

    An Adam step from zero moments is the gradient's sign: entries of tiny gradient go either way too.
    """
    gradients = 1e-3 if experiment.config.method.sparsity == 0 and task > 0 else 1e-2
    if len(experiment.sample) == 3 and device.type == "cuda":
        gradients = 3e-2  # cuDNN's convolutions are TF32, PyTorch's default

    def of(name: str) -> float:
        return 0.1 if name.startswith("step/") else gradients

    return of


def memory(experiment: Experiment, contender: str) -> float:
    """About how many bytes a contender needs at the last task, measured with room."""
    size, hyper = experiment.layout().size, experiment.config.hypernet
    layers = {OURS: 3.5, ANY_LOOP: 3.5, "hypnettorch": 7.5, "batched torch": 5.0, "torch.compile": 5.0}
    layers["plain network"] = 0.0
    if hyper.chunk_size:
        return 5e8 + 40.0 * experiment.tasks * size
    weights = 4.0 * size * hyper.hidden[-1]
    return 5e8 + layers.get(contender, 10.0) * weights + 16.0 * experiment.tasks * size


# -- contenders -------------------------------------------------------------------------------------------------------


def build(experiment: Experiment, task: int, contender: str, device: torch.device) -> "StepRun":
    if contender in ("reference", "reference plain"):
        return ReferenceRun(experiment, task, contender, device)
    captured = contender.endswith("captured")
    kind = contender.removesuffix(" captured")
    makers = {
        OURS: lambda: library(experiment, device, captured),
        ANY_LOOP: lambda: library(experiment, device, captured, in_backward=False),
        "hypnettorch": lambda: hypnettorch(experiment, device),
        "batched torch": lambda: batched(experiment, device, captured=captured),
        "torch.compile": lambda: batched(experiment, device, compiled=True),
        "plain network": lambda: plain(experiment, device),
    }
    peer, pieces = makers[kind]()
    return (CapturedRun if captured else StepRun)(experiment, task, device, peer, pieces)


def _settings(experiment: Experiment) -> dict:
    method = experiment.config.method
    names = ("beta", "lam", "drift_norm", "drift_masked")
    return {name: getattr(method, name) for name in names} | {"lr": experiment.config.training.lr}


def _peer_settings(experiment: Experiment) -> dict:
    hyper = experiment.config.hypernet
    names = ("embedding", "hidden", "chunk_size", "chunk_embedding")
    method = {"num_tasks": experiment.tasks, "sparsity": experiment.config.method.sparsity}
    return {name: getattr(hyper, name) for name in names} | method | _settings(experiment)


def library(experiment: Experiment, device: torch.device, captured: bool, **settings: Any):
    """settings: more of `Library`'s."""
    from .peers.ours import Library

    tune_allocator()  # as the command line does; see OWN_ALLOCATOR
    config = experiment.config
    made = Library(
        experiment.network(),
        experiment.tasks,
        config.method.sparsity,
        config.hypernet,
        captured=captured,
        device=device,
        **settings,
        **_settings(experiment),
    )
    model = made.model
    pieces = {f"embedding.{j}": whole(e) for j, e in enumerate(model.hypernet.embeddings)}
    if config.hypernet.chunk_size:
        pieces["chunk_embeddings"] = whole(model.hypernet.chunk_embeddings)
    pieces |= _layer_pieces([*model.hypernet.trunk, model.hypernet.output])
    pieces |= {f"target.{s}": whole(w) for s, w in enumerate(model.weights())}
    masked = {id(weight) for weight in model.weights()}
    rest = [p for p in model.net.parameters() if id(p) not in masked]
    return made, pieces | {f"shared.{i}": whole(p) for i, p in enumerate(rest)}


def _layer_pieces(layers: list[nn.Linear]) -> dict[str, Piece]:
    names = [f"trunk.{i}" for i in range(len(layers) - 1)] + ["output"]
    return {
        f"{name}.{part}": whole(getattr(layer, part))
        for name, layer in zip(names, layers, strict=True)
        for part in ("weight", "bias")
    }


def _functional(experiment: Experiment, device: torch.device, dtype: torch.dtype | None = None):
    """Initial target tensors, (weights, x) -> logits, and the Parameters that are not masked."""
    dtype = dtype or torch.get_default_dtype()
    net = experiment.network().to(device, dtype)
    names = masked_names(net)
    shared = shared_parameters(net)
    weights = [net.get_parameter(name) for name in names]

    def forward(effective: list[Tensor], x: Tensor) -> Tensor:
        return functional_call(net, dict(zip(names, effective, strict=True)), (x,))

    if experiment.config.target.name == "mlp":
        return weights, _mlp, shared
    return weights, forward, shared


def _mlp(weights: list[Tensor], x: Tensor) -> Tensor:
    """A ReLU MLP over W1, b1, ..., Wn, bn."""
    h = x.flatten(1)
    for i in range(0, len(weights) - 2, 2):
        h = nn.functional.relu(nn.functional.linear(h, weights[i], weights[i + 1]))
    return nn.functional.linear(h, weights[-2], weights[-1])


def hypnettorch(experiment: Experiment, device: torch.device):
    try:
        from .peers.hypnettorch_loop import HypnettorchLoop
    except ImportError as error:
        raise Unavailable(f"hypnettorch is not installed ({error})") from error
    weights, forward, shared = _functional(experiment, device)
    made = HypnettorchLoop(weights, forward, shared=shared, **_peer_settings(experiment))
    *unconditional, last = made.hypernet.unconditional_params
    unconditional.append(last)
    pieces = {f"embedding.{j}": whole(e) for j, e in enumerate(made.hypernet.conditional_params)}
    if experiment.config.hypernet.chunk_size:
        pieces["chunk_embeddings"] = whole(unconditional.pop())
    names = [f"trunk.{i}" for i in range(len(unconditional) // 2 - 1)] + ["output"]
    for i, name in enumerate(names):
        pieces[f"{name}.weight"], pieces[f"{name}.bias"] = (whole(p) for p in unconditional[2 * i : 2 * i + 2])
    pieces |= {f"target.{s}": whole(w) for s, w in enumerate(made.weights)}
    return made, pieces | {f"shared.{i}": whole(p) for i, p in enumerate(shared)}


def batched(
    experiment: Experiment,
    device: torch.device,
    compiled: bool = False,
    captured: bool = False,
    dtype: torch.dtype | None = None,
):
    from .peers.batched_torch import BatchedTorch

    weights, forward, shared = _functional(experiment, device, dtype)
    made = BatchedTorch(
        weights, forward, shared=shared, compiled=compiled, captured=captured, **_peer_settings(experiment)
    )
    width = experiment.config.hypernet.embedding
    pieces = {f"embedding.{j}": Piece(made.embeddings, j * width, (j + 1) * width) for j in range(experiment.tasks)}
    if made.chunks:
        pieces["chunk_embeddings"] = whole(made.chunk_embeddings)
    pieces |= _layer_pieces(list(made.layers))
    borders = zip(made.offsets, made.offsets[1:], strict=False)
    pieces |= {f"target.{s}": Piece(made.weight, start, stop) for s, (start, stop) in enumerate(borders)}
    return made, pieces | {f"shared.{i}": whole(p) for i, p in enumerate(shared)}


def plain(experiment: Experiment, device: torch.device, dtype: torch.dtype | None = None):
    from .peers.plain import Plain

    net = experiment.network().to(device, dtype)
    made = Plain(net, experiment.config.training.lr)
    pieces = {f"target.{s}": whole(net.get_parameter(name)) for s, name in enumerate(masked_names(net))}
    return made, pieces | {f"shared.{i}": whole(p) for i, p in enumerate(shared_parameters(net))}


# -- runs -------------------------------------------------------------------------------------------------------------


class StepRun:
    """Steps of one contender; see `case.Runnable`. The gate sees the first: loss, gradients, Parameters after it."""

    calls = 1

    def __init__(self, experiment: Experiment, task: int, device: torch.device, peer, pieces: dict[str, Piece]) -> None:
        self.peer, self.pieces, self.specs = peer, pieces, experiment.tensors()
        self.batches = experiment.batches(device)
        self.done = 0
        fill(pieces, self.specs, moved=False)
        peer.begin_task(task)
        fill(pieces, self.specs, moved=True)

    def run(self) -> None:
        self.done += 1
        self.peer.step(*self.batches[self.done % len(self.batches)])

    def first_loss(self) -> Tensor:
        return self.peer.step(*self.batches[0])

    def result(self) -> dict[str, Sketch]:
        loss = self.first_loss()
        if hasattr(self.peer, "last_loss"):
            loss = self.peer.last_loss()
        found = {"loss": sketch("loss", loss)}
        state = self.peer.optimizer.state
        for name, piece in self.pieces.items():
            # After one step from zero, the first moment is (1 - beta1) times the gradient.
            moment = state[piece.parameter].get("exp_avg") if piece.parameter in state else None
            values = torch.zeros(piece.stop - piece.start) if moment is None else piece.of(moment)
            found[f"grad/{name}"] = sketch(name, values, lambda block, start: block / (1 - BETA1))
            found[f"step/{name}"] = sketch(name, piece.of(piece.parameter))
        return found


def graph_nodes(graph: torch.cuda.CUDAGraph) -> int | None:
    """How many nodes a kept CUDA graph has: launches, copies and fills. None where nobody can say."""
    count = ctypes.c_size_t()
    try:
        address = ctypes.c_void_p(graph.raw_cuda_graph())
        failed = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(address, None, ctypes.byref(count))
    except (OSError, AttributeError, RuntimeError):
        return None
    return None if failed else count.value


class CapturedRun(StepRun):
    """A step as a CUDA graph, replayed; the gate sees a replay from the initial values. nodes: see `graph_nodes`."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(3):
                    self.peer.step(*self.batches[0])
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph(keep_graph=True)  # to be counted
            with torch.cuda.graph(self.graph):
                self.loss = self.peer.step(*self.batches[0])
            self.nodes = graph_nodes(self.graph)
        except RuntimeError as error:
            raise Unavailable(f"the step can't be captured: {str(error).splitlines()[0]}", broken=True) from error
        fill(self.pieces, self.specs, moved=True)
        for state in self.peer.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    def run(self) -> None:
        self.graph.replay()

    def first_loss(self) -> Tensor:
        self.graph.replay()
        return self.loss


class ReferenceRun:
    """The oracle: batched PyTorch in float64, gradients by autograd and one Adam step written out."""

    calls = 1

    def __init__(self, experiment: Experiment, task: int, contender: str, device: torch.device) -> None:
        self.lr, self.specs = experiment.config.training.lr, experiment.tensors()
        # Without weight drift a bias before batch norm has no gradient but rounding, whose sign is the whole step.
        self.compare_steps = contender != "reference plain" and task > 0
        make = plain if contender == "reference plain" else batched
        self.peer, self.pieces = make(experiment, device, dtype=torch.float64)
        x, self.y = experiment.batches(device)[0]
        self.x = x.double()
        fill(self.pieces, self.specs, moved=False)
        self.peer.begin_task(task)
        fill(self.pieces, self.specs, moved=True)

    def run(self) -> None:
        raise Unavailable("the reference is not timed")

    def result(self) -> dict[str, Sketch]:
        if hasattr(self.peer, "loss"):
            loss = self.peer.loss(self.x, self.y, self.peer.sparsity)
        else:
            loss = nn.functional.cross_entropy(self.peer.net(self.x), self.y)
        loss.backward()
        found = {"loss": sketch("loss", loss)}
        for name, piece in self.pieces.items():
            gradient = piece.of(piece.parameter.grad)
            found[f"grad/{name}"] = sketch(name, gradient)
            if self.compare_steps:
                found[f"step/{name}"] = self._stepped(name, piece, gradient)
        return found

    def _stepped(self, name: str, piece: Piece, gradient: Tensor) -> Sketch:
        """The Parameter after a step, its scale the norm of the step: an error is measured against that."""
        values = piece.of(piece.parameter)
        start, change = 0, 0.0
        for block in initial_blocks(name, self.specs[name], moved=True, device=values.device):
            stop = start + len(block)
            g = gradient[start:stop]
            step = self.lr * g / (g.abs() + EPS)
            change += step.square().sum().item()
            values[start:stop].sub_(step)
            start = stop
        found = sketch(name, values)
        found.scale = change**0.5
        return found
