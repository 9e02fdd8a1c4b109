"""What tests of the Trainer give it."""

from hypermask_fast.training.config import TrainingConfig


class Recorder:
    """A logger that remembers."""

    def __init__(self, stop_at: tuple[int, int] | None = None):
        self.rows, self.tasks, self.advanced, self.said, self.stop_at = [], [], 0, [], stop_at

    def begin_task(self, task, iterations, start_iteration):
        self.tasks.append((task, iterations, start_iteration))
        self.here = [task, start_iteration]

    def step(self, task, iteration, values):
        self.rows.append((task, iteration, values))

    def advance(self, iterations):
        self.here[1] += iterations
        self.advanced += iterations
        if self.stop_at == tuple(self.here):
            raise InterruptedError

    def message(self, text):
        self.said.append(text)

    def close(self): ...


def config(**settings):
    settings = {"iterations": 40, "batch_size": 32, "lr": 1e-2, "log_every": 10, "checkpoint_every": 15} | settings
    return TrainingConfig(**settings)
