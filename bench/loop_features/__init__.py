"""What people do in a training loop, each as a way to make a step; `bench.loops` runs them."""

from . import gradients  # noqa: F401  before what builds on it, which is also the order of the table

# isort: split
from . import surroundings  # noqa: F401
