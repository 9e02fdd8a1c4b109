"""Imported once by the process that `processes` forks its ranks from."""

import torch

from . import sharding

torch.set_num_threads(1)  # a fork has no threads of OpenMP's, and would wait for them
sharding.warm_up()
