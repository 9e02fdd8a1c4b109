"""A training step in several processes: sharded, replicated, and as DistributedDataParallel does it by itself.

    python -m bench.ranks permuted-mnist --ranks 1 2 4
    python -m bench.ranks permuted-mnist --ranks 2 --mbit 1000     # each rank in a network namespace of its own; root

Ranks are processes on this machine, which share its cores and its memory. Each takes its share of the experiment's
batch. Rows are appended to bench/results/ranks/MACHINE.csv: the step of the slowest rank, how much each rank sends,
and how much memory a rank's layer takes with its moments.
"""

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import hypermask_fast as hmf

from . import machine, results
from .experiments import Experiment, experiments, quick

WAYS = ("sharded", "replicated", "DDP alone")
WARM_UP = 2
TIMEOUT = 900.0  # seconds for one group of processes
_NETWORK = "10.99.0."  # of the namespaces


@dataclass
class Row:
    """One way of training in one number of processes.

    Attributes:
        way: "sharded" and "replicated" by hmf.distributed; "DDP alone": the layer's gradient is averaged in full;
            "one process" for 1 rank.
        mbit: megabits per second that each rank's link lets through; 0 for the machine's own memory.
        median_ms, p20_ms, p80_ms: of a step, of the slowest rank in each.
    XX
        sent_for_hypernetwork: of these, what is left without the target network's gradients, one all-reduce.
        layer_bytes: of the output layer and its moments on one rank.
    """

    date: str
    commit: str
    machine: str
    cores: int
    threads: int
    torch: str
    backend: str
    experiment: str
    task: int
    entries: int
    width: int
    way: str
    ranks: int
    mbit: int
    steps: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    sent: float
    sent_for_hypernetwork: float
    layer_bytes: int
    command: str


# -- in one rank ------------------------------------------------------------------------------------------------------


class Traffic:
    """Bytes that this rank hands to collectives, as rings would send them."""

    def __init__(self) -> None:
        self.sent = 0.0

    def add(self, tensor: Tensor, passes: int = 2) -> None:
        """passes: 2 of an all-reduce over the tensor, 1 of an all-to-all of it, whose own part stays here."""
        self.sent += ring(passes, tensor.numel() * tensor.element_size())

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts what goes through torch.distributed's functions within the block."""
        passes = {"all_reduce": (0, 2), "all_to_all_single": (1, 1)}
        before = {name: getattr(dist, name) for name in passes}

        def counting(name: str, at: int, times: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.add(args[at], times)
                return before[name](*args, **kwargs)

            return call

        for name, (at, times) in passes.items():
            setattr(dist, name, counting(name, at, times))
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(dist, name, function)


def ring(passes: int, size: int) -> float:
    """Bytes that a rank sends of an array of `size` bytes: an all-reduce passes twice over it."""
    ranks = dist.get_world_size()
    return passes * size * (ranks - 1) / ranks


class Training:
    """One way of training an experiment's model on this rank."""

    def __init__(self, experiment: Experiment, way: str, task: int) -> None:
        self.task = task
        self.model = model = build(experiment)
        self.call: nn.Module = model
        self.traffic = Traffic()
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if way == "sharded":
            hmf.distributed.shard(model)
        elif way == "replicated":
            hmf.distributed.replicate(model)
        elif way == "DDP alone":
            self.call = DistributedDataParallel(WithLoss(model), find_unused_parameters=True)
            self.call.register_comm_hook(self.traffic, counted_all_reduce)
        rank = dist.get_rank() if ranks > 1 else 0
        self.batches = [
            (x.tensor_split(ranks)[rank], y.tensor_split(ranks)[rank])
            for x, y in experiment.batches(torch.device("cpu"))
        ]
        if way == "DDP alone":
            self.optimizer: Any = torch.optim.Adam(model.parameters(), fused=True)
        else:
            self.optimizer = hmf.optim.Adam(model, step_in_backward=True)
        model.begin_task(task)

    def step(self, number: int) -> None:
        x, y = self.batches[number % len(self.batches)]
        self.optimizer.zero_grad()
        if isinstance(self.call, DistributedDataParallel):
            loss = self.call(x, y, self.task)
        else:
            loss = loss_of(self.model, x, y, self.task)
        loss.backward()
        self.optimizer.step()

    def layer_bytes(self) -> int:
        layer = [self.model.hypernet.output.weight, self.model.hypernet.output.bias]
        moments = [self.optimizer.state[p][name] for p in layer for name in ("exp_avg", "exp_avg_sq")]
        return sum(local(tensor).numel() * local(tensor).element_size() for tensor in (*layer, *moments))


def local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class WithLoss(nn.Module):
    """What DistributedDataParallel is given, for all that has a gradient must be used in its forward pass."""

    def __init__(self, model: hmf.HyperMask) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor, task: int) -> Tensor:
        return loss_of(self.model, x, y, task)


def loss_of(model: hmf.HyperMask, x: Tensor, y: Tensor, task: int) -> Tensor:
    mask = model.mask(task)
    return F.cross_entropy(model(x, mask), y) + model.regularizer(mask)


def counted_all_reduce(traffic: Traffic, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    traffic.add(bucket.buffer())
    return default_hooks.allreduce_hook(None, bucket)  # pyright: ignore[reportArgumentType]  # None: all processes


def build(experiment: Experiment) -> hmf.HyperMask:
    torch.manual_seed(0)
    config, method = experiment.config, experiment.config.method
    settings = {"beta": method.beta, "lam": method.lam, "drift_norm": method.drift_norm}
    settings["drift_masked"] = method.drift_masked
    net = experiment.network()
    return hmf.HyperMask(net, experiment.tasks, method.sparsity, config.hypernet, fidelity="official", **settings)


def measure(experiment: Experiment, way: str, task: int, steps: int) -> dict[str, Any]:
    """This rank's part of a Row; step times are those of the slowest rank."""
    training = Training(experiment, way, task)
    for number in range(WARM_UP):
        training.step(number)
    times = []
    with training.traffic.counted():
        training.traffic.sent = 0.0
        for number in range(steps):
            began = time.perf_counter()
            training.step(number)
            times.append(time.perf_counter() - began)
    slowest = torch.tensor(times, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    sent = training.traffic.sent / steps
    target = 4 * sum(parameter.numel() for parameter in training.model.net.parameters())
    return {
        "times": slowest.tolist(),
        "sent": sent,
        "sent_for_hypernetwork": max(sent - ring(2, target), 0.0) if sent else 0.0,
        "layer_bytes": training.layer_bytes(),
    }


def worker(experiment: Experiment, ways: list[str], task: int, steps: int, threads: int) -> None:
    """A rank: measures every way and, on the first rank, prints what it found as JSON."""
    torch.set_num_threads(threads)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    found = {}
    for way in ways:
        found[way] = measure(experiment, way, task, steps)
        if dist.is_initialized():
            dist.barrier()
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(found), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


# -- groups of processes ----------------------------------------------------------------------------------------------


@contextmanager
def links(ranks: int, mbit: int) -> Iterator[list[list[str]]]:
    """How each rank's command begins: in a network namespace of its own, whose link lets `mbit` Mbit/s through.

    The namespaces hang on one bridge, as machines on a switch. mbit 0: no namespaces.
    """
    if mbit == 0:
        yield [[] for _ in range(ranks)]
        return
    names = [f"hmf{rank}" for rank in range(ranks)]
    try:
        _ip("link add hmfbr type bridge")
        _ip("link set hmfbr up")
        for rank, name in enumerate(names):
            _ip(f"netns add {name}")
            _ip(f"link add {name}v type veth peer name eth0 netns {name}")
            _ip(f"link set {name}v master hmfbr")
            _ip(f"link set {name}v up")
            for words in (f"addr add {_NETWORK}{rank + 1}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _ip(f"-n {name} {words}")
            rate = f"rate {mbit}mbit burst 256k latency 50ms"
            subprocess.run(["tc", "-n", name, *f"qdisc add dev eth0 root tbf {rate}".split()], check=True)
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            with suppress(subprocess.CalledProcessError):
                _ip(f"netns del {name}")
        with suppress(subprocess.CalledProcessError):
            _ip("link del hmfbr")


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


def group(arguments: argparse.Namespace, ranks: int, ways: list[str], threads: int) -> dict[str, Any]:
    """Runs a group of processes to its end; what its first rank found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = ["--worker", *ways, "--task", str(arguments.task), "--steps", str(arguments.steps)]
    command = [sys.executable, "-m", "bench.ranks", arguments.experiment, *own, "--threads", str(threads)]
    command += ["--quick"] * arguments.quick
    with links(ranks, arguments.mbit) as prefixes:
        address = f"{_NETWORK}1" if arguments.mbit else "127.0.0.1"
        processes = []
        for rank, prefix in enumerate(prefixes):
            environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": address}
            environment |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads)}
            if arguments.mbit:
                environment["GLOO_SOCKET_IFNAME"] = "eth0"
            output = subprocess.PIPE if rank == 0 else None
            processes.append(subprocess.Popen([*prefix, *command], env=environment, stdout=output, text=True))
        try:
            text, _ = processes[0].communicate(timeout=TIMEOUT)
            codes = [process.wait(timeout=60) for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")
    return json.loads(text)


def rows(arguments: argparse.Namespace, experiment: Experiment, command: str) -> list[Row]:
    about = machine.describe(torch.device("cpu"))
    cores = len(os.sched_getaffinity(0))
    said = {name: about[name] for name in ("commit", "machine", "cores", "torch", "backend")}
    said |= {"experiment": experiment.name, "task": arguments.task, "entries": experiment.layout().size}
    said |= {"width": experiment.config.hypernet.hidden[-1], "mbit": arguments.mbit, "command": command}
    times: dict[tuple[int, str], list[float]] = {}
    last: dict[tuple[int, str], dict[str, Any]] = {}
    for _ in range(arguments.rounds):
        for ranks in arguments.ranks:
            ways = arguments.ways if ranks > 1 else ["one process"]
            threads = max(cores // ranks, 1)
            for way, found in group(arguments, ranks, ways, threads).items():
                times.setdefault((ranks, way), []).extend(1e3 * seconds for seconds in found["times"])
                last[ranks, way] = {**found, "threads": threads}
    made = []
    for (ranks, way), each in times.items():
        found = last[ranks, way]
        p20, median, p80 = (statistics.quantiles(each, n=10)[i] for i in (1, 4, 7))
        measured = {"way": way, "ranks": ranks, "median_ms": median, "p20_ms": p20, "p80_ms": p80, "steps": len(each)}
        measured |= {name: found[name] for name in ("threads", "sent", "sent_for_hypernetwork", "layer_bytes")}
        made.append(Row(date=datetime.now(timezone.utc).isoformat(timespec="seconds"), **said, **measured))
    return made


def text(made: list[Row]) -> str:
    lines = [f"{made[0].experiment}, task {made[0].task}: N {made[0].entries}, H {made[0].width}"]
    lines.append("ranks  way           ms a step   MB sent   of these hypernetwork   4N    MB of layer and moments")
    for row in made:
        size = 4 * row.entries
        lines.append(
            f"{row.ranks:5}  {row.way:12} {row.median_ms:10.1f} {row.sent / 1e6:9.2f} "
            f"{row.sent_for_hypernetwork / 1e6:11.2f} = {row.sent_for_hypernetwork / size:5.2f} x 4N "
            f"{row.layer_bytes / 1e6:15.1f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ranks", description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=list(experiments()))
    parser.add_argument("--task", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=10, help="of each way in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mbit", type=int, default=0, help="of each rank's link, in a network namespace; needs root")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; kept only with --csv")
    parser.add_argument("--csv", type=Path, metavar="F", help="append to F, not to the machine's file")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    experiment = experiments()[arguments.experiment]
    experiment = quick(experiment) if arguments.quick else experiment
    if arguments.worker:
        worker(experiment, arguments.worker, arguments.task, arguments.steps, arguments.threads)
        return 0
    command = shlex.join(["python", "-m", "bench.ranks", *(sys.argv[1:] if argv is None else argv)])
    made = rows(arguments, experiment, command)
    print(text(made))
    if arguments.csv or not arguments.quick:
        results.append(made, arguments.csv or results.FOLDER / "ranks" / f"{made[0].machine}.csv", Row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
