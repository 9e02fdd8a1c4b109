"""Ops of inference where the task is unknown."""

from ..op_case import FORWARD, OpCase, Work


def entropy_select(tasks: int, rows: int, classes: int) -> OpCase:
    """Each row's task of lowest entropy."""
    return OpCase(
        "entropy_select",
        f"{tasks} tasks, batch {rows}, {classes} classes",
        lambda draw: (draw(tasks, rows, classes, low=-4, high=4),),
        {FORWARD: Work(tasks * rows * classes)},
        results=("task",),
    )
