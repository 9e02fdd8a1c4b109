"""The settings of one launch of a tiled product, and what is launched where a GPU lacks the resources for them."""

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton import OutOfResources


@dataclass(frozen=True, slots=True)
class Tiles:
    """One launch of a tiled product: the accumulator is (block_m, block_n), the reduction goes by block_k.

    splits > 1 divides the reduction among that many programs, whose partial sums a second launch adds in order.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    splits: int = 1

    def launch(self, dtype: torch.dtype) -> dict[str, int | None]:
        """Keywords of a launch whose products are in dtype. Left alone, ptxas may spill a few registers of a
        half-precision kernel to fit one more program on a multiprocessor."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.warps,
            "maxnreg": None if dtype == torch.float32 else 255,
            "num_stages": self.stages,
        }

    def launch_chunks(self, dtype: torch.dtype) -> dict[str, int | None]:
        """The same where block_k steps over the hypernetwork's width."""
        settings = self.launch(dtype)
        settings["BLOCK_H"] = settings.pop("BLOCK_K")
        return settings

    def smaller(self) -> "Tiles | None":
        """The next tiles that need less shared memory or fewer registers, None after the smallest."""
        if self.block_k > 16:
            return replace(self, block_k=self.block_k // 2)
        if self.stages > 1:
            return replace(self, stages=self.stages - 1)
        if self.block_n > 16:
            return replace(self, block_n=self.block_n // 2)
        return replace(self, block_m=self.block_m // 2) if self.block_m > 16 else None


_instead: dict[Hashable, Tiles] = {}  # kernel, dtypes and tiles that were refused -> those that were not


def launch_fitting(kernel: str, launch: Callable[[Tiles], object], tiles: Tiles, *operands: Tensor) -> None:
    """launch(tiles); where the GPU refuses them for want of resources, smaller ones, as small as it takes.

    A warning says so once, and the same kernel for operands of the same dtypes goes there directly from then on. The
    settings are chosen so that this does not happen on the GPUs that they are tested for.

    Raises:
        OutOfResources: not even the smallest tiles are accepted.
    """
    key = (kernel, tiles, *(operand.dtype for operand in operands))
    fitting, refused = _instead.get(key, tiles), None
    while True:
        try:
            launch(fitting)
            break
        except OutOfResources as error:
            refused, smaller = refused or error, fitting.smaller()
            if smaller is None:
                raise
            fitting = smaller
    if refused is not None:
        _instead[key] = fitting
        warnings.warn(
            f"{kernel} needs more {refused.name} ({refused.required}) than this GPU has ({refused.limit}) with "
            f"{tiles}; from now on it runs with {fitting}, perhaps slower",
            stacklevel=2,
        )
