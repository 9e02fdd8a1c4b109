from typing import Any

from torch import nn

class DynamicModule(nn.Module):
    def adaptation(self, experience: Any) -> None: ...

class MultiTaskModule(DynamicModule):
    known_train_tasks_labels: set[int]
