"""The settings of one launch of a tiled product."""

from dataclasses import dataclass

import torch


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
