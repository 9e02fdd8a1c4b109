"""Serving: passes in evaluation under W * m that was made before."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import packing
from .anchored import without_autocast
from .checks import is_whole
from .errors import InputError
from .hypernet import ChunkedHyperNetwork, HyperNetwork
from .life import is_id
from .mask_making import MaskMaking, values_at_hand
from .masking.cache import Counted, Entry, KeptMask, WeightCache, contents, is_plain, version
from .masking.masks import TaskMask
from .masking.selection import MASKED
from .ops import registry
from .ops.checksum import is_fast
from .packed_model import rest_of
from .packing import Packed
from .transforming import transforming


class _Source(NamedTuple):
    """What W * m of all tasks is made from, besides the tasks' embeddings; nbytes: of one task's W * m."""

    settings: Hashable
    tensors: list[Tensor]
    nbytes: int


class Serving(MaskMaking):
    """Mask making whose evaluation passes keep W * m.

    Attributes:
        cache: what is kept.
    """

    cache: WeightCache

    @property
    def cache_bytes(self) -> int:
        """How many bytes of W * m may be kept between passes in evaluation: 256 MiB unless it is set; 0 keeps nothing.

        W * m is kept by passes that record no gradient, `model(x, task)` with any task and `forward_all_tasks`, in
        evaluation mode, from a task's second such pass on. Each pass first sees whether everything that W * m was made
        from still holds the same: on a CPU with the extension by a checksum over all of it, which takes one read of it
        and misses a change with a probability of about 2^-64. Elsewhere that would take longer, and W * m is kept
        within `serving` only.

        Raises:
            InputError: when it is set to a number below 0, or too small for one task.
        """
        return self.cache.limit

    @cache_bytes.setter
    def cache_bytes(self, limit: int) -> None:
        with self.cache.lock:
            self.cache.resize(limit, self._source().nbytes)

    @contextmanager
    def serving(self) -> Iterator["Serving"]:
        """Within the block, in all threads, passes keep W * m of the tasks in use, and record no gradient.

        It is your word that weights are changed only in ways that PyTorch counts: steps of optimisers,
        `load_state_dict`, `copy_`, new Parameters, `.to()`. After these W * m is made again. So a pass is checked by
        version counters, in microseconds, in place of checksums. A write through an alias that it does not count
        (`p.data`, `p.detach().numpy()`, a replayed CUDA graph, another process) is seen when the block ends.

        Raises:
            InputError: the model is in training mode, nothing can be kept of it, or, when the block ends, a kept W * m
                is no longer that of the weights.
        """
        if self.training:
            raise InputError("serving() is for evaluation: call model.eval() first")
        source = self._source()
        if why := self._not_to_be_kept(source):
            raise InputError(f"serving() can't keep the masks of this model: {why}")
        if any(tensor.is_inference() for tensor in source.tensors):
            raise InputError("serving() needs version counters: this model's weights were made in inference mode")
        if not 0 < source.nbytes <= self.cache.limit:
            raise InputError(
                f"serving() keeps nothing: W * m of one task takes {source.nbytes} bytes, and cache_bytes is "
                f"{self.cache.limit}"
            )
        counting = register_optimizer_step_post_hook(_count_step)
        with self.cache.lock:
            self.cache.serving += 1
        try:
            yield self
            self._check_served()
        finally:
            counting.remove()
            with self.cache.lock:
                self.cache.serving -= 1

    def _check_served(self) -> None:
        """Raises InputError where what is kept is not of what the weights hold, and no version counter says so."""
        with self.cache.lock:
            source = self._source()
            shared: Hashable = None
            for task, entry in self.cache.entries().items():
                embedding = self.hypernet.embeddings[task]
                if not entry.counted.still(source.settings, [*source.tensors, embedding]):
                    continue
                shared = shared or contents(source.tensors)
                if entry.contents != (source.settings, shared, contents([embedding])):
                    self.cache.clear()
                    raise InputError(
                        f"weights were written to within serving() in a way that PyTorch does not count, such as "
                        f"p.data: answers for task {task} since then may be of older weights (make such changes "
                        "outside of the block)"
                    )

    def train(self, mode: bool = True) -> "Serving":
        """See nn.Module.train. What is kept for evaluation is dropped when training begins."""
        cache = self.__dict__.get("cache")
        if mode and cache is not None:
            if cache.serving:
                raise InputError("the model is within serving(), which is for evaluation: leave the block first")
            with cache.lock:
                cache.clear()
        super().train(mode)
        return self

    @torch.no_grad()
    def pack(self, tasks: Iterable[int] | Tensor | None = None, dtype: str = "float32") -> Packed:
        """The masks of tasks as they are now, with all that is needed to run them: see `packing.Packed`, and
        `inference.load_packed` for a network that needs no hypernetwork. `print(model.pack())` says how large it is.

        Args:
            tasks: ids; None: all.
            dtype: of masks, and of the weights beside them: "float32", which gives the model's own outputs; "bfloat16";
                "int8": masks in 255 steps of a scale per tensor, and bfloat16 for the weights.

        Raises:
            InputError: a task or a dtype that does not exist, masks that are not finite, a network whose output
                layer is not known yet, or one with a module whose get_extra_state says more than a buffer can.
        """
        chosen = self.task_ids(tasks)
        packing.check(chosen, dtype)
        if self.heads() is None:
            raise InputError("which layer is the output layer is found in the first pass: run one batch before pack()")
        packing.check_no_state_of_modules(self.net)
        tensors = packing.packed_rest(rest_of(self, chosen))
        rows = zip(self.layout.segments, self.weights(), strict=True)
        tensors |= dict(packing.packed_weight(s.name, weight, dtype) for s, weight in rows if s.selected)
        for task in chosen:
            masks = self.mask(task).masks()
            applied = [masks[segment.name] for segment in self.layout.segments if segment.selected]
            if not all(bool(mask.isfinite().all()) for mask in applied):
                raise InputError(f"the mask of task {task} is not finite: it can't be packed")
            tensors |= packing.packed_mask(task, applied, dtype)
        return Packed(chosen, dtype, self._described(chosen), tensors)

    def _described(self, tasks: Sequence[int]) -> packing.Network:
        unused = {segment.name for segment in self.layout.segments if not segment.selected}
        dtypes = {name: str(p.dtype).removeprefix("torch.") for name, p in self.net.named_parameters()}
        parameters = tuple(
            {
                "name": row.name,
                "shape": list(row.shape),
                "dtype": dtypes[row.name],
                "kind": row.kind,
                "applied": row.kind == MASKED and row.name not in unused,
            }
            for row in self.layout.rows
        )
        of_batch = any(module.batch_statistics for module in self.statistics())
        classes = None if self.classes is None else tuple(self.classes[task] for task in tasks)
        return packing.Network(parameters, of_batch, classes)

    # -- what passes ask for --------------------------------------------------------------------------------------

    def _records_in_serving(self) -> bool:
        """Whether a pass that is about to record gradients is within `serving`, where none does."""
        return not torch.compiler.is_compiling() and self.cache.serving > 0 and torch.is_grad_enabled()

    def _kept_one(self, task: Any) -> KeptMask | None:
        """`_kept` of what a forward pass takes as one task."""
        if torch.is_grad_enabled() or isinstance(task, TaskMask):
            return None
        if isinstance(task, Tensor) and is_id(task) and values_at_hand(task):
            task = int(task)
        if not is_whole(task):
            return None
        kept = self._kept([int(task)])
        return None if kept is None else kept[0]

    def _masks_of_groups(self, tasks: list[int]) -> Sequence[TaskMask | KeptMask]:
        """Of the tasks in one batch; averaged over ranks, which may have other tasks in theirs, they come from all."""
        for task in tasks:
            self._check_task(task)
        if self.reducer is not None:
            self.reducer.check_same_tasks(tasks, self.num_tasks, self.training)
        if (kept := self._kept(tasks)) is not None:
            return kept
        averages = self.hypernet.processes is not None
        logits = self._logits_of(range(self.num_tasks))[tasks] if averages else self._logits_of(tasks)
        return [self._mask_of(task, of_task) for task, of_task in zip(tasks, logits, strict=True)]

    @without_autocast
    def _kept(self, tasks: Sequence[int]) -> list[KeptMask] | None:
        """W * m of these tasks, as far as it can from the cache; None where nothing is to be kept in this pass."""
        cache = self.cache
        if torch.is_grad_enabled() or self.training or not cache.limit or torch.compiler.is_compiling():
            return None
        source, by_counters = self._source(), cache.serving > 0
        if self._not_to_be_kept(source) or source.nbytes > cache.limit:
            return None
        if not by_counters and not (all(map(is_fast, source.tensors)) and self._seen_before(source)):
            return None
        shared = None if by_counters else contents(source.tensors)
        with cache.lock:
            found: dict[int, tuple[Tensor | None, ...]] = {}
            for task in dict.fromkeys(tasks):
                self._check_task(task)
                entry = cache.get(task)
                if entry is not None and self._holds(entry, source, shared, task):
                    found[task] = entry.weights
            missing = [task for task in dict.fromkeys(tasks) if task not in found]
            cache.hits += len(found)
            if missing:
                found |= self._made(missing, source, shared, beside=set(tasks))
        plain = tuple(self.weights())
        return [KeptMask(task, self.layout, plain, tuple(map(_first, found[task], plain))) for task in tasks]

    def _holds(self, entry: Entry, source: _Source, shared: Hashable, task: int) -> bool:
        """Whether an entry is W * m of the weights as they are; shared: `contents` of the source, None: by counters."""
        embedding = self.hypernet.embeddings[task]
        if shared is None:
            return entry.counted.still(source.settings, [*source.tensors, embedding])
        return entry.contents == (source.settings, shared, contents([embedding]))

    def _made(
        self, tasks: Sequence[int], source: _Source, shared: Hashable, beside: set[int]
    ) -> dict[int, tuple[Tensor | None, ...]]:
        """W * m of tasks, made and kept, unless another thread changes the weights meanwhile."""
        cache, embeddings = self.cache, [self.hypernet.embeddings[task] for task in tasks]
        shared = contents(source.tensors) if shared is None else shared
        before = [(shared, contents([embedding])) for embedding in embeddings]
        counted = [Counted(source.settings, [*source.tensors, embedding]) for embedding in embeddings]
        with torch.inference_mode(False), torch.no_grad():  # tensors that are of use outside of inference mode too
            made = [
                tuple(
                    value if segment.selected else None
                    for value, segment in zip(mask.effective, self.layout.segments, strict=True)
                )
                for mask in self._masks_of(tasks).for_one_use()
            ]
        cache.made += len(made)
        now = contents(source.tensors)
        for task, weights, of_task, seen, embedding in zip(tasks, made, before, counted, embeddings, strict=True):
            if of_task == (now, contents([embedding])):
                nbytes = sum(weight.nbytes for weight in weights if weight is not None)
                cache.put(task, Entry(weights, (source.settings, *of_task), seen, nbytes), beside)
        return dict(zip(tasks, made, strict=True))

    def _source(self) -> _Source:
        selected = [w for w, s in zip(self.weights(), self.layout.segments, strict=True) if s.selected]
        settings = self.layout, self.sparsity, registry.requested(), selected[0].device if selected else None
        return _Source(settings, [*self.hypernet.shared(), *selected], sum(weight.nbytes for weight in selected))

    def _seen_before(self, source: _Source) -> bool:
        """Whether the pass before, as far as counters tell, was under the same weights: a single pass between two
        steps of training is not worth a checksum."""
        now = source.settings, *((id(tensor), tensor.data_ptr(), version(tensor)) for tensor in source.tensors)
        with self.cache.lock:
            before, self.cache.glimpse = self.cache.glimpse, now
        return before == now

    def _not_to_be_kept(self, source: _Source) -> str:
        """Why it is not known what this model's masks are made from, "" if it is."""
        if type(self.hypernet) not in (HyperNetwork, ChunkedHyperNetwork):
            return f"its hypernetwork is a {type(self.hypernet).__name__}"
        if self.hypernet.processes is not None:
            return "it is trained by several processes"
        if type(self).mask is not MaskMaking.mask or "mask" in vars(self):
            return "it makes masks in a way of its own"
        if not all(is_plain(tensor) for tensor in [*source.tensors, *self.hypernet.embeddings]):
            return "its weights are no ordinary tensors"
        if len({tensor.device for tensor in source.tensors}) != 1:
            return "its weights are on several devices"
        if transforming() or _is_dispatched():
            return "a transformation of torch.func, or a dispatch mode, is under way"
        return ""


def _is_dispatched() -> bool:
    """Whether a dispatch mode handles tensors in its own way. There is no public way to ask."""
    private: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    return private._len_torch_dispatch_stack() > 0  # noqa: SLF001


def _count_step(optimizer: Optimizer, *arguments: Any) -> None:
    """A hook of every optimiser's step: PyTorch's fused ones do not count what they write."""
    stepped = [p for group in optimizer.param_groups for p in group["params"] if not p.is_inference()]
    torch.autograd.graph.increment_version(stepped)


def _first(kept: Tensor | None, weight: Tensor) -> Tensor:
    return weight if kept is None else kept
