"""The tables of a run's settings: data, method and training. `targets` and `hypernet` have the two others.

A field's annotation says what it may be, and what it means stands below "Attributes:". From here it goes to the
checks, to `hypermask-fast settings` and to the documentation.
"""

from dataclasses import dataclass
from typing import Annotated

from ..data.folders import COLOURS, NORMALISATIONS
from ..errors import InputError
from ..moments import MOMENTS
from ..settings import OneOf, Range, Text, Widths, check_fields

# Of schedule = plateau: the learning rate is multiplied by FACTOR after more than PATIENCE epochs without a better
# validation accuracy, down to LOWEST.
PLATEAU_FACTOR, PLATEAU_PATIENCE, PLATEAU_LOWEST = 0.1**0.5, 5, 5e-7
GRADIENTS = ("auto", "factored", "dense")
SHARDS = ("auto", "hypernetwork", "none")
BATCH_NORMS = ("synchronised", "local")


@dataclass(frozen=True)
class DataConfig:
    """Where the tasks come from.

    Attributes:
        scenario: which data, cut into which tasks; or "images", of the folder `dir`; or a function of one's own that
            returns them, `file.py:function` or `module:function`; `--scenario` and `--images` set it.
        dir: the folder where its files lie; `--data-dir` sets it.
        tasks: how many, the first ones; without it, all that the scenario has.
        validation: training samples of each task that are held out to validate, its first ones; without it and
            validation_per_class, the scenario's own number.
        validation_per_class: of each class of a task, the first training samples, in place of validation.
        edition: of the scenario's data, where they have become others under the same name; `train` writes it, and a run
            of an earlier one can't go on.
        classes_per_task: of images in a folder per class; `--classes-per-task` sets it.
        image_size: of images, [height, width], to which they are scaled and cut; without it, all must have one size.
        colour: of images, "rgb" or "grey"; without it, rgb.
        normalise: of images, "none" (values 0 to 1), by the statistics of "imagenet", or by those of the "first-task";
            without it, none.
        fingerprint: of the images' names and sizes, or of the file of a function of one's own, as they were when the
            run began; `train` writes it.
    """

    scenario: Annotated[str, Text(longest=4096)]
    dir: Annotated[str | None, Text(path=True, longest=4096)] = None
    tasks: Annotated[int | None, Range(1, unit="tasks")] = None
    validation: Annotated[int | None, Range(0, unit="samples")] = None
    validation_per_class: Annotated[int | None, Range(0, unit="samples")] = None
    edition: Annotated[int | None, Range(1)] = None
    classes_per_task: Annotated[int | None, Range(2, unit="classes")] = None
    image_size: Annotated[tuple[int, ...] | None, Widths(1, "pixels")] = None
    colour: Annotated[str | None, OneOf(COLOURS)] = None
    normalise: Annotated[str | None, OneOf(NORMALISATIONS)] = None
    fingerprint: Annotated[str | None, Text()] = None


@dataclass(frozen=True)
class MethodConfig:
    """The method's strengths; see `HyperMask`.

    Attributes:
        sparsity: how many of each tensor's entries a mask sets to 0.
        beta: weight of the output drift, which holds the hypernetwork to the masks it made for earlier tasks.
        lam: weight of the weight drift, which holds the target network's weights where earlier tasks need them.
        drift_norm: the weight drift's norm, 1 or 2.
        drift_masked: whether the weight drift counts each weight as much as the running task's mask lets it through.
        ramp: whether sparsity grows from 0 over the first task's iterations, or is there from the beginning.
    """

    sparsity: Annotated[float, Range(0, 100, unit="percent")] = 0.0
    beta: Annotated[float, Range(0)] = 0.01
    lam: Annotated[float, Range(0)] = 0.01
    drift_norm: Annotated[int, Range(1, 2)] = 1
    drift_masked: bool = True
    ramp: bool = True


@dataclass(frozen=True)
class TrainingConfig:
    """How each task is trained.

    Attributes:
        lr: learning rate of Adam, which starts afresh with every task.
        batch_size: training samples per iteration.
        iterations: length of each task in training steps; this or epochs.
        epochs: length of each task in passes over its training samples; this or iterations.
        keep: the "last" model of a task, or the one of "best" validation accuracy, which is measured every
            `validate_every` iterations, at each epoch's end and at the last iteration.
        schedule: how the learning rate goes: "constant", or "plateau": ReduceLROnPlateau on validation accuracy per
            epoch.
        validate_every: how often validation accuracy is measured, where keep or schedule asks for it.
        log_every: how often the loss and its parts are logged; the only moments at which the loop waits for a GPU.
        checkpoint_every: how often a checkpoint is saved within a task; 0 for one at each task's end only.
        evaluation_batch: samples that are evaluated at once; it decides memory, and on some devices the last bits. A
            network whose batch norm uses the batch's own statistics has each split whole.
        precision: "float32", or "bf16" to train the target network under autocast.
        gradient: of the hypernetwork's output layer: "factored" steps it within the backward pass (`optim.Adam` with
            step_in_backward), "dense" by torch.optim.Adam; "auto": factored where the layer is dense.
        drift_tasks: how many of the earlier tasks each step draws for the output drift, whose mean over draws is the
            drift over all of them; without it, or with fewer earlier tasks, all. It bounds a step's time and leaves
            memory as it is.
        moments: in which dtype Adam keeps both moments of the output layer's weight: "float32", or "bfloat16", which
            takes a third less of memory and 20 bytes a weight and step in place of 28. Arithmetic is in float32; the
            moments are rounded at random, so that small changes add up. It needs a factored gradient.
        cuda_graph: whether, on a GPU, the training step is captured and replayed; in several processes it never is.
        shard: in several processes, whether each of them has a part of the hypernetwork's output layer ("hypernetwork")
            or all of it ("none"); "auto": a part, where there are rows or chunks for every one.
        batch_norm: in several processes, whether it normalises by the whole batch ("synchronised", the numbers of one
            process) or by each one's share ("local", whose running statistics are averaged).
        inspect: whether the masks are inspected after every task (`analysis.inspect`): inspect.json, inspect.csv, rows
            in the log, and in the folder learned what is kept of each task to measure its drift. It changes no other
            number. In several processes it needs shard = none.

    Raises:
        InputError: a value of another type or out of its range; neither iterations nor epochs, or both.
    """

    lr: Annotated[float, Range(0, above=True)] = 1e-3
    batch_size: Annotated[int, Range(1, unit="samples")] = 128
    iterations: Annotated[int | None, Range(1, unit="iterations")] = None
    epochs: Annotated[int | None, Range(1, unit="epochs")] = None
    keep: Annotated[str, OneOf(("last", "best"))] = "last"
    schedule: Annotated[str, OneOf(("constant", "plateau"))] = "constant"
    validate_every: Annotated[int, Range(1, unit="iterations")] = 100
    log_every: Annotated[int, Range(1, unit="iterations")] = 100
    checkpoint_every: Annotated[int, Range(0, unit="iterations")] = 1000
    evaluation_batch: Annotated[int, Range(1, unit="samples")] = 1000
    precision: Annotated[str, OneOf(("float32", "bf16"))] = "float32"
    gradient: Annotated[str, OneOf(GRADIENTS)] = "auto"
    drift_tasks: Annotated[int | None, Range(1, unit="tasks")] = None
    moments: Annotated[str, OneOf(MOMENTS)] = "float32"
    cuda_graph: bool = True
    shard: Annotated[str, OneOf(SHARDS)] = "auto"
    batch_norm: Annotated[str, OneOf(BATCH_NORMS)] = "synchronised"
    inspect: bool = False

    def __post_init__(self) -> None:
        if (self.iterations is None) == (self.epochs is None):
            raise InputError("training takes either iterations or epochs, one of the two")
        check_fields(self, "training")
        if self.moments != "float32" and self.gradient == "dense":
            raise InputError(f"training.moments = {self.moments} needs a factored gradient: take auto or factored")

    @property
    def validates(self) -> bool:
        """Whether validation accuracy decides anything."""
        return self.keep == "best" or self.schedule == "plateau"

    def length(self, samples: int) -> int:
        """Iterations of a task with that many training samples; an epoch's last, partial batch counts."""
        return self.iterations or (self.epochs or 0) * self.epoch_length(samples)

    def epoch_length(self, samples: int) -> int:
        return -(-samples // self.batch_size)
