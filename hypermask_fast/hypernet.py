"""What shape a hypernetwork has: dense or in chunks, of which widths, and how much memory it takes."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch

from . import sizing
from .checks import check_whole
from .chunked import ChunkedHyperNetwork
from .dense import HyperNetwork
from .errors import InputError
from .masking.layout import MaskLayout
from .settings import WIDEST, Range, Widths, check_fields


@dataclass(frozen=True)
class HypernetConfig:
    """Shape of a hypernetwork.

    Attributes:
        embedding: size E of a task's embedding.
        hidden: widths of the hidden layers (ELU); the last one is H.
        chunk_size: entries that the output layer generates at a time, C of N, in chunks; without it (None) all N.
        chunk_embedding: size of a chunk's embedding, for a chunked hypernetwork.
        by_tensor: with chunk_size, whether each masked tensor begins a chunk of its own. A tensor's last chunk is
            truncated, and no chunk straddles two tensors.

    Raises:
        InputError: a size that is no positive integer, or beyond any machine.
    """

    embedding: Annotated[int, Range(1, WIDEST, unit="numbers")] = 48
    hidden: Annotated[tuple[int, ...], Widths(1)] = (100,)
    chunk_size: Annotated[int | None, Range(1, unit="mask entries")] = None
    chunk_embedding: Annotated[int, Range(1, WIDEST, unit="numbers")] = 8
    by_tensor: bool = False

    def __post_init__(self) -> None:
        hidden = self.hidden if isinstance(self.hidden, Iterable) else (self.hidden,)
        object.__setattr__(self, "hidden", tuple(hidden))
        check_fields(self, "hypernetwork")
        if self.by_tensor and self.chunk_size is None:
            raise InputError("hypernetwork by_tensor says how chunks lie: it needs a chunk_size")

    @classmethod
    def auto(cls, layout: MaskLayout, budget_bytes: int, **settings: Any) -> "HypernetConfig":
        """The largest hypernetwork that trains within a budget: dense where that fits, or else in chunks.

        16 bytes a parameter in float32: weight, gradient, and Adam's two moments; see `sizing.parameters` for how many
        there are. Masks, the target network and its own training come beside it.

        Args:
            layout: of the target network, `MaskLayout.of(net)`.
            budget_bytes: bytes.
            settings: all others than chunk_size; by_tensor is True unless it is given.

        Raises:
            InputError: not even the smallest one fits.
        """
        budget_bytes = check_whole("budget_bytes", budget_bytes, 1)
        dense = cls(**{**settings, "by_tensor": False, "chunk_size": None})
        if sizing.TRAINED * dense.num_parameters(layout) <= budget_bytes:
            return dense
        chunked = cls(**{"by_tensor": True, **settings, "chunk_size": 1})
        return replace(chunked, chunk_size=chunked.fitting(layout, budget_bytes))

    def num_parameters(self, layout: MaskLayout) -> int:
        """How many parameters it has for the tensors of a layout, besides the tasks' embeddings."""
        sizes = self.embedding, self.hidden, self.chunk_size, self.chunk_embedding
        return sizing.parameters(self.tensors(layout), *sizes)

    def fitting(self, layout: MaskLayout, budget_bytes: int) -> int:
        """The largest chunk_size that trains within a budget; see `auto`."""
        sizes = self.embedding, self.hidden, self.chunk_embedding
        return sizing.chunk_size(self.tensors(layout), *sizes, budget_bytes)

    def tensors(self, layout: MaskLayout) -> Sequence[int]:
        """Entries of each tensor that begins a chunk of its own."""
        return [segment.size for segment in layout.segments] if self.by_tensor else [layout.size]

    def check_memory(self, layout: MaskLayout, device: torch.device) -> None:
        """Raises InputError where it is larger than the memory of the device, or of this machine, where it is made."""
        if device.type == "meta":
            return
        devices = [torch.device("cpu")] if device.type == "cpu" else [torch.device("cpu"), device]
        memory, count = min(map(sizing.total_memory, devices)), self.num_parameters(layout)
        if sizing.TRAINED * count > memory:
            hint = "take smaller hidden widths"
            for share in (1, 2, 4):  # of the memory; the smallest share that does
                with suppress(InputError):
                    hint = f"try HypernetConfig(chunk_size={self.fitting(layout, int(memory) // share)})"
            if self.chunk_size is None and sizing.ROUNDED * count <= memory < sizing.WITH_ADAM * count:
                hint = f"keep moments in bfloat16 (optim.Adam, training.moments), or {hint}"
            sizing.check_memory(count, devices, hint)

    def build(self, size: int, num_tasks: int, tensors: Sequence[int] | None = None) -> "HyperNetwork":
        """The hypernetwork of this shape for `size` entries and `num_tasks` tasks.

        tensors: entries of each masked tensor, which sum to `size`; needed where chunks are `by_tensor`.
        """
        if self.chunk_size is None:
            return HyperNetwork(size, num_tasks, self.embedding, self.hidden)
        if self.by_tensor and tensors is None:
            raise InputError("a hypernetwork whose chunks follow the tensors needs to know their sizes")
        shape = self.chunk_size, self.embedding, self.chunk_embedding, self.hidden
        return ChunkedHyperNetwork(size, num_tasks, *shape, tensors if self.by_tensor else None)
