"""Chunked hypernetworks: one small output layer generates the logits chunk by chunk."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import ops
from .dense import HyperNetwork, Layer, after_first
from .few_rows import linear
from .processes import local
from .transforming import transforming


class _WithoutRest(torch.autograd.Function):
    """(T, N) of whole chunks' outputs, without what is cut off at each tensor's end. One array in backward, where
    autograd would make several of N numbers."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, tensors: Sequence[int], padded: list[int]) -> Tensor:
        ctx.tensors, ctx.padded = list(tensors), padded
        return _without_rest(whole, tensors, padded)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] (the decorator's signature)
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        whole = grad.new_zeros(len(grad), sum(ctx.padded))
        for part, given in zip(whole.split(ctx.padded, 1), grad.split(ctx.tensors, 1), strict=True):
            part[:, : given.shape[1]] = given
        return whole, None, None


def _without_rest(whole: Tensor, tensors: Sequence[int], padded: Sequence[int]) -> Tensor:
    parts = zip(whole.split(list(padded), 1), tensors, strict=True)
    return torch.cat([part[:, :entries] for part, entries in parts], 1)


class ChunkedHyperNetwork(HyperNetwork):
    """a_t = concatenation over chunks c of MLP([chunk embedding c, task embedding t]), cut to N entries.

    Chunk embeddings ~ N(0, 1) are shared by all tasks and trained. The first layer is split into a part per chunk
    and a part per task, added: T + chunks rows of work instead of T * chunks.

    Args:
        size: N; chunk_size: C entries per chunk, the last chunk truncated; others: see `HypernetConfig`.
        tensors: sizes that sum to N: each of them begins a chunk of its own and has its last chunk truncated.
    """

    factored = False  # its layer is small, its gradient ordinary
    lengths: tuple[int, ...] = ()

    def __init__(
        self,
        size: int,
        num_tasks: int,
        chunk_size: int,
        embedding: int,
        chunk_embedding: int,
        hidden: Iterable[int],
        tensors: Sequence[int] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.tensors = (size,) if tensors is None else tuple(tensors)
        chunk_size = min(chunk_size, max(self.tensors))
        self.chunks = tuple(-(-entries // chunk_size) for entries in self.tensors)  # of each tensor
        self._build(size, num_tasks, embedding, chunk_embedding + embedding, tuple(hidden), rows=chunk_size)
        self.chunk_embeddings = nn.Parameter(torch.randn(sum(self.chunks), chunk_embedding))
        self.hold(0, sum(self.chunks))

    def hold(self, start: int, stop: int) -> None:
        """Says which chunks are generated in this process: start to stop - 1, of all tensors' one after another."""
        self.held = tuple(self._pieces(start, stop))
        for length in self.lengths:
            delattr(self, f"chunks_of_{length}")
        of_length, on = self._chunks_of_length() if len(self.held) > 1 else {}, self.output.weight.device
        self.lengths = tuple(of_length)
        for length, chunks in of_length.items():
            self.register_buffer(f"chunks_of_{length}", torch.tensor(chunks, device=on), persistent=False)

    def entries(self, start: int, stop: int) -> int:
        """How many entries chunks start to stop - 1 generate."""
        return sum(entries for entries, _ in self._pieces(start, stop))

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Of each tensor that these chunks generate a part of: how many entries, by how many chunks."""
        rows, first = self.output.out_features, 0
        for entries, chunks in zip(self.tensors, self.chunks, strict=True):
            low, high = max(start - first, 0), min(stop - first, chunks)
            if low < high:
                yield min(high * rows, entries) - low * rows, high - low
            first += chunks

    def _chunks_of_length(self) -> dict[int, list[int]]:
        """Which of the chunks here generate how many entries: C, or fewer where a tensor ends."""
        found: dict[int, list[int]] = {}
        first, rows = 0, self.output.out_features
        for entries, chunks in self.held:
            for number in range(chunks):
                found.setdefault(min(rows, entries - number * rows), []).append(first + number)
            first += chunks
        return found

    def _stretch(self, tasks: Iterable[int], start: int, stop: int) -> Tensor:
        """Only the chunks that the entries lie in are made."""
        begin = chunk = 0  # of the tensor that the stretch lies in
        for entries, chunks in zip(self.tensors, self.chunks, strict=True):
            if start < begin + entries:
                break
            begin, chunk = begin + entries, chunk + chunks
        rows = self.output.out_features
        first, last = (start - begin) // rows, -((begin - stop) // rows)
        hidden, layer = self.generating(tasks, slice(chunk + first, chunk + last))
        logits = ops.hypernet_logits(hidden, *layer, rows * (last - first))
        return logits[:, start - begin - first * rows : stop - begin - first * rows]

    def generating(self, tasks: Iterable[int] | Tensor, chunks: slice = slice(None)) -> tuple[Tensor, Layer]:
        """What generates logits: (T, chunks, H) last hidden layer for each task and each chunk that is here, or some
        of these, and the output layer, which is whole in every process."""
        of_trunk: Any = self.trunk  # nn.Linears
        trunk = [tensor for layer in of_trunk for tensor in (layer.weight, layer.bias)]
        embedded, *rest = self._fanned_out(self.embed(tasks), *trunk, self.output.weight, self.output.bias)
        (weight, bias), *layers, output = zip(rest[::2], rest[1::2], strict=True)
        width = self.chunk_embeddings.shape[1]
        of_chunk, of_task = weight.split([width, weight.shape[1] - width], dim=1)
        per_chunk = F.linear(local(self.chunk_embeddings)[chunks], of_chunk)
        per_task = linear(embedded, of_task, bias)
        return after_first(per_chunk[None] + per_task[:, None], layers), output

    def shared(self) -> list[Tensor]:
        return [*super().shared(), self.chunk_embeddings]

    def layer(self) -> Layer:
        weight, bias = self._fanned_out(self.output.weight, self.output.bias)
        return weight, bias

    def _fanned_out(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors if self.processes is None else self.processes.fanned_out(*tensors)

    def _own_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not self.lengths:
            return ops.hypernet_logits(hidden, weight, bias, self.held[0][0])
        rows = len(weight)
        whole = ops.hypernet_logits(hidden, weight, bias, rows * hidden.shape[1])
        tensors, padded = [entries for entries, _ in self.held], [rows * n for _, n in self.held]
        if not torch.compiler.is_compiling() and transforming():
            return _without_rest(whole, tensors, padded)
        return _WithoutRest.apply(whole, tensors, padded)

    @torch.no_grad()
    def drift_targets(self, task: int) -> tuple[Tensor, ...]:
        """The output layer and its inputs as of now: smaller than the logits, and all that `output_drift` needs."""
        hidden = self.earlier_hidden(task)
        if self.processes is not None:
            hidden = self.processes.placed(hidden, len(self.chunk_embeddings))
        return (hidden, self.output.weight.clone(), self.output.bias.clone())

    def drift_target_shapes(self, task: int) -> tuple[tuple[int, ...], ...]:
        weight = self.output.weight.shape
        return ((task, len(self.chunk_embeddings), weight[1]), tuple(weight), (weight[0],))

    def _own_drift(self, hidden: Tensor, weight: Tensor, bias: Tensor, *targets: Tensor) -> Tensor:
        """At a cost that does not grow with N; see `ops.chunked_output_drift`.

        Where chunks follow the tensors: a sum over lengths, of the chunks that generate so many entries, so that what
        is cut off does not count.
        """
        old_hidden, old_weight, old_bias = targets
        if not self.lengths:
            entries = self.held[0][0]
            return ops.chunked_output_drift(hidden, weight, bias, old_hidden, old_weight, old_bias, entries)
        total = hidden.new_zeros(())
        for length in self.lengths:
            chunks: Any = getattr(self, f"chunks_of_{length}")
            new = hidden.index_select(1, chunks), weight[:length], bias[:length]
            old = old_hidden.index_select(1, chunks), old_weight[:length], old_bias[:length]
            total = total + ops.chunked_output_drift(*new, *old, length * len(chunks))
        return total
