"""The named shapes that the microbenchmarks run over, and every op's case at each of them."""

from functools import cache

from .. import op_cases
from ..experiments import Experiment, experiments, quick
from ..op_case import OpCase
from ..op_cases import Convolution

CHUNK = 8000  # of the chunked hypernetwork
SHAPES = ("tiny", "mnist-mlp", "resnet20")


@cache
def cases(shape: str) -> dict[str, OpCase]:
    """Op -> its case at this shape. "tiny" has every op; an op of the dense output layer has none at "resnet20", whose
    layer is too large for a microbenchmark."""
    known = experiment(shape)
    if shape == "tiny":
        made = [*_mlp(known, 150), *_convolutions(Convolution("", 4, 8, 6, 3, batch=2), 150, 10)]
    elif shape == "mnist-mlp":
        made = _mlp(known, CHUNK)
    else:
        layer = Convolution("resnet20", 64, 64, 16, 3)
        made = [*_network(known), *_chunked(known, CHUNK), *_convolutions(layer, CHUNK, 100)]
    return {case.op: case for case in made}


def experiment(shape: str) -> Experiment:
    """Whose network and hypernetwork have this shape."""
    known = experiments()["resnet20-k2" if shape == "resnet20" else "split-mnist"]
    return quick(known) if shape == "tiny" else known


def _network(experiment: Experiment) -> list[OpCase]:
    return op_cases.of_network(experiment.shapes(), experiment.tasks)


def _chunked(experiment: Experiment, chunk: int) -> list[OpCase]:
    size, width = experiment.layout().size, experiment.config.hypernet.hidden[-1]
    return [
        op_cases.hypernet_logits(1, size, width, chunk),
        op_cases.chunked_output_drift(experiment.tasks - 1, size, width, chunk),
    ]


def _mlp(experiment: Experiment, chunk: int) -> list[OpCase]:
    size, width = experiment.layout().size, experiment.config.hypernet.hidden[-1]
    (outputs, inputs), rows, tasks = experiment.shapes()[0], experiment.batch, experiment.tasks
    return [
        *_network(experiment),
        *_chunked(experiment, chunk),
        op_cases.hypernet_logits(1, size, width),
        op_cases.output_drift(tasks - 1, size, width),
        op_cases.hypernet_adam(tasks, size, width),
        op_cases.output_residuals(tasks, size, width),
        op_cases.hidden_gradient(tasks, size, width),
        op_cases.factored_adam(tasks, size, width),
        op_cases.masked_linear(rows, inputs, outputs),
        op_cases.chunk_masked_linear(rows, inputs, outputs, chunk, width),
        op_cases.task_batched_linear(tasks, rows, inputs, outputs),
        op_cases.entropy_select(tasks, rows, experiment.classes),
    ]


def _convolutions(layer: Convolution, chunk: int, width: int) -> list[OpCase]:
    return [op_cases.masked_conv2d(layer), op_cases.chunk_masked_conv2d(layer, chunk, width)]
