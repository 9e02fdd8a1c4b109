"""A model of the sharded training step: bytes sent, memory and time per rank, for 1 to 1,024 ranks.

    python -m bench.scaling

Writes bench/results/scaling/model.csv and model.svg, and draws the model beside what `python -m bench.ranks` measured
on this machine (measured.svg). docs/design/scaling.md explains it. Nothing is measured here.
"""

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from math import log2
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from . import results

FOLDER = results.FOLDER / "scaling"
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TASKS = (1, 10, 100, 1000)
FLOAT = 4  # bytes
# Bytes per mask entry and step that every rank moves, however many there are. Logits are read for the thresholds (12),
# W * m is made (12), its gradient becomes those of W and of the logits (20), the weight drift reads W, W as the task
# began and the logits, forward and backward (24), and Adam steps W (28).
PER_ENTRY = 96


@dataclass(frozen=True)
class Node:
    """What a rank runs on.

    Attributes:
        memory_rate: bytes per second of a pass over arrays in place; flop_rate: float32 operations per second.
        link_rate: bytes per second that a rank sends; latency: seconds of one message between two ranks.
        host: seconds of a step that are neither bytes nor operations: Python, launches.
    """

    name: str
    memory_rate: float
    flop_rate: float
    link_rate: float
    latency: float
    host: float

    def shared_by(self, ranks: int) -> "Node":
        """The same where all ranks are on one machine and share its cores and its memory."""
        return replace(self, memory_rate=self.memory_rate / ranks, flop_rate=self.flop_rate / ranks)


@dataclass(frozen=True)
class Network:
    """What is trained: N entries, a last hidden layer of H, and the target's operations for one step's batch."""

    name: str
    entries: float
    width: int = 100
    batch_flops: float = 0.0


@dataclass(frozen=True)
class Step:
    """One step of task number `earlier` (as many tasks are before it) on each of `ranks` ranks, in seconds and bytes.

    Attributes:
        layer_s: the pass over the own rows: 28 N H / K bytes, or 6 N H (t + 1) / K operations, whichever takes longer.
        own_s: what every rank does with all N entries; batch_s: the target network on the own share of the batch.
        wire_s: all collectives; sent: bytes that a rank sends in them.
        memory: of the layer, its moments, the targets and the target network, bytes on a rank.
    """

    node: str
    network: str
    entries: float
    width: int
    earlier: int
    ranks: int
    layer_s: float
    own_s: float
    batch_s: float
    host_s: float
    wire_s: float
    step_s: float
    sent: float
    sent_by_ddp: float
    memory: float


def step(node: Node, network: Network, earlier: int, ranks: int) -> Step:
    entries, width = network.entries, network.width
    moved = 7 * FLOAT * entries * width + FLOAT * entries * earlier
    layer = max(moved / node.memory_rate, 6 * entries * width * (earlier + 1) / node.flop_rate) / ranks
    own = PER_ENTRY * entries / node.memory_rate
    batch = network.batch_flops / node.flop_rate / ranks
    others = (ranks - 1) / ranks
    # Logits are gathered and their gradients scattered, N numbers each. The target's gradients are N numbers too, which
    # an all-reduce passes over twice. The hidden vectors' are small.
    sent = FLOAT * others * (entries + entries + 2 * entries + 2 * (earlier + 1) * width)
    wire = sent / node.link_rate + 6 * log2(ranks) * node.latency
    return Step(
        node.name,
        network.name,
        entries,
        width,
        earlier,
        ranks,
        layer,
        own,
        batch,
        node.host,
        wire,
        layer + own + batch + node.host + wire,
        sent,
        FLOAT * others * 2 * (entries * width + entries),
        memory(network, earlier, ranks),
    )


def memory(network: Network, earlier: int, ranks: int) -> float:
    """Bytes on a rank: weight and two moments of the own rows, their targets, and ten arrays of the network's size."""
    rows = network.entries / ranks
    return FLOAT * (rows * (3 * (network.width + 1) + earlier) + 10 * network.entries)


# Rates that were stated by others, not measured here: an H200's memory as a copy moves it, float32 on its ordinary
# cores, one InfiniBand NDR port for each GPU, and NVLink within one machine.
H200 = Node("H200, 400 Gbit/s each", 4.3e12, 60e12, 50e9, 5e-6, 0.3e-3)
NVLINK = replace(H200, name="H200, NVLink", link_rate=450e9, latency=3e-6)
NETWORKS = (
    Network("permuted-mnist, N = 2.0 million", 2_036_010),
    Network("ResNet-18, N = 11 million", 11.2e6),
    Network("ViT-Base, N = 86 million", 86e6),
    Network("N = 1 billion", 1e9),
    Network("N = 10 billion", 1e10),
)


def table(nodes: tuple[Node, ...]) -> pd.DataFrame:
    made = [step(node, net, t, ranks) for node in nodes for net in NETWORKS for t in TASKS for ranks in RANKS]
    return pd.DataFrame([asdict(each) for each in made])


# -- the machine that was measured ------------------------------------------------------------------------------------


def measured_node(rows: pd.DataFrame, mbit: int) -> Node:
    """A node with the rates of this machine, from its step in one process: all of it counted as the layer's pass and
    what every rank does, which overstates neither by much where the layer is large."""
    alone = rows[rows.ranks == 1].iloc[-1]
    moved = (7 * FLOAT * alone.width + FLOAT * alone.task + PER_ENTRY) * alone.entries
    link = mbit * 1e6 / 8 if mbit else 5e9
    return Node("this machine", moved / (1e-3 * alone.median_ms), 1e12, link, 1e-4, 0.0)


def draw_measured(rows: pd.DataFrame, file: Path) -> None:
    """What was measured, and the model with the rates of one process, the ranks sharing its cores and memory."""
    colours = dict(zip(rows[rows.ranks > 1].way.unique(), ("#0072b2", "#e69f00", "#d55e00"), strict=False))
    cases = list(rows[rows.ranks > 1][["mbit", "ranks"]].drop_duplicates().itertuples(index=False, name=None))
    network = Network("", float(rows.entries.iloc[0]), int(rows.width.iloc[0]))
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for place, (mbit, ranks) in enumerate(cases):
        here = rows[(rows.mbit == mbit) & (rows.ranks == ranks)].set_index("way").median_ms
        at = [place + 0.27 * (i - 1) for i, way in enumerate(colours) if way in here]
        ways = [way for way in colours if way in here]
        bars = axis.bar(at, [here[way] for way in ways], 0.25, color=[colours[way] for way in ways])
        axis.bar_label(bars, [f"{here[way]:,.0f}" for way in ways], fontsize=8, padding=2)
        node = measured_node(rows, mbit).shared_by(ranks)
        model = 1e3 * step(node, network, int(rows.task.iloc[0]), ranks).step_s
        axis.plot([at[0] - 0.14, at[0] + 0.14], [model, model], "k-", linewidth=2)
    marks = [Patch(color=colour, label=f"{way}, measured") for way, colour in colours.items()]
    model_mark = Line2D([], [], color="k", linewidth=2, label="sharded, the model")
    axis.legend(handles=[*marks, model_mark], loc="upper left", frameon=False)
    links = {0: "through memory"}
    names = [f"{ranks} ranks, {links.get(mbit, f'links of {mbit / 1000:g} Gbit/s')}" for mbit, ranks in cases]
    axis.set_xticks(range(len(cases)), names)
    axis.set(ylabel="milliseconds per step", yscale="log", ylim=(100, 60_000))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_title("A step of permuted-mnist, all ranks on the same two cores")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


# -- the model's picture ----------------------------------------------------------------------------------------------


def draw(frame: pd.DataFrame, file: Path, earlier: int = 10) -> None:
    """Time, memory and bytes sent of a step against the number of ranks."""
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 6.4), layout="constrained")
    time, memory_of_one, sent, legend = axes.flat
    chosen = frame[(frame.earlier == earlier) & (frame.node == H200.name)]
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000")
    for (name, rows), colour in zip(chosen.groupby("network", sort=False), colours, strict=True):
        style = {"color": colour, "markersize": 3, "label": name}
        time.plot(rows.ranks, 1e3 * rows.step_s, "o-", **style)
        memory_of_one.plot(rows.ranks, rows.memory / 1e9, "o-", **style)
        sent.plot(rows.ranks[1:], rows.sent[1:] / 1e9, "o-", **style)
        sent.plot(rows.ranks[1:], rows.sent_by_ddp[1:] / 1e9, ":", color=colour)
    memory_of_one.axhline(141, color="grey", linestyle="--", linewidth=1)
    memory_of_one.text(1024, 160, "an H200's memory", fontsize=8, color="grey", ha="right")
    _label(time, "Time of a step", "milliseconds")
    _label(memory_of_one, "Memory of a rank", "GB")
    _label(sent, "Sent by a rank in a step", "GB")
    legend.set_axis_off()
    handles, labels = time.get_legend_handles_labels()
    handles.append(Line2D([], [], color="grey", linestyle=":"))
    legend.legend(handles, [*labels, "DistributedDataParallel alone"], loc="center", frameon=False)
    figure.suptitle(f"Model of the sharded step: {earlier} earlier tasks, H = 100, {H200.name}", fontsize=10)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _label(axis: Axes, title: str, unit: str) -> None:
    axis.set(title=title, xlabel="number of ranks", ylabel=unit, xscale="log", yscale="log")
    axis.set_xticks(RANKS[::2], [str(k) for k in RANKS[::2]])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=Path, metavar="CSV", help="rows of bench.ranks (default: all kept ones)")
    parser.add_argument("--to", type=Path, default=FOLDER, metavar="DIR")
    arguments = parser.parse_args(argv)
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "hypermask_fast", "font.size": 9}
    arguments.to.mkdir(parents=True, exist_ok=True)
    frame = table((H200, NVLINK))
    frame.to_csv(arguments.to / "model.csv", index=False, float_format="%.6g", lineterminator="\n")
    draw(frame, arguments.to / "model.svg")
    kept = [arguments.ranks] if arguments.ranks else sorted((results.FOLDER / "ranks").glob("*.csv"))
    if kept:
        rows = pd.concat([pd.read_csv(path) for path in kept])
        rows = rows[rows.experiment == "permuted-mnist"].drop_duplicates(["way", "ranks", "mbit"], keep="last")
        draw_measured(rows, arguments.to / "measured.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
