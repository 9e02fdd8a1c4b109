"""Means and covariances of classes, collected in a stream, and squared distances from them by one factor per class."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError

_WELL_CONDITIONED = 1e-10  # of a Cholesky factor's pivots, the smallest by the largest
_IN_CACHE = 2**19  # numbers, 2 MB of float32: distances are worked on so many at a time


@dataclass
class ClassSums:
    """Sums over the features of one class, as batches arrive.

    Attributes:
        count: n, samples so far.
        origin: (D,) float64, the first sample: sums are of z = f - origin, so that large means cancel nothing.
        first: (D,) sum of z; second: (D, D) sum of z z'. float64.
    """

    origin: Tensor
    count: int = 0
    first: Tensor = field(init=False)
    second: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.first = torch.zeros_like(self.origin)
        self.second = self.origin.new_zeros(len(self.origin), len(self.origin))

    def add(self, features: Tensor) -> None:
        """Takes (n, D) float64 features in."""
        z = features - self.origin
        self.count += len(z)
        self.first += z.sum(0)
        self.second.addmm_(z.T, z)

    def mean(self) -> Tensor:
        """(D,) origin + (sum z) / n."""
        return self.origin + self.first / self.count

    def covariance(self) -> Tensor:
        """(D, D) unbiased: (sum z z' - (sum z)(sum z)' / n) / (n - 1)."""
        return (self.second - torch.outer(self.first, self.first) / self.count) / (self.count - 1)


class TaskSums:
    """`ClassSums` of the classes of one task, which appear as their first samples do."""

    def __init__(self, task: int) -> None:
        self.task = task
        self.classes: dict[int, ClassSums] = {}

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Takes a batch in: (B, D) features and (B,) int64 classes of the task."""
        features = features.double()
        for label in labels.unique().tolist():
            of_class = features[labels == label]
            if label not in self.classes:
                self.classes[label] = ClassSums(of_class[0].clone())
            self.classes[label].add(of_class)

    def check(self) -> None:
        """Raises InputError where there is no class, or one of a single sample: it has no covariance."""
        if not self.classes:
            raise InputError(f"task {self.task} has no samples to fit: give it some of every class")
        for label, sums in sorted(self.classes.items()):
            if sums.count < 2:
                raise InputError(
                    f"class {label} of task {self.task} has one sample, and a covariance takes two or more: give it "
                    "more samples, or leave the class out"
                )


# -- covariances ------------------------------------------------------------------------------------------------------


def shrunk(covariance: Tensor, diagonal: float, off_diagonal: float) -> Tensor:
    """S + a d I + b o (1 1' - I): d the mean of S's diagonal, o that of its non-zero off-diagonal entries (0: none).

    Args:
        covariance: S, (..., D, D).
        diagonal: a; off_diagonal: b.

    Source: Goswami et al. 2023 (FeCAM), with a = b = 1.
    """
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    diagonals = covariance.diagonal(dim1=-2, dim2=-1)
    off = covariance - torch.diag_embed(diagonals)
    d = diagonals.mean(-1)[..., None, None]
    o = (off.sum((-2, -1)) / off.count_nonzero((-2, -1)).clamp_min(1))[..., None, None]
    return covariance + diagonal * d * eye + off_diagonal * o * (1 - eye)


def correlation(covariance: Tensor) -> Tensor:
    """R_ij = S_ij / sqrt(S_ii S_jj), (..., D, D)."""
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    return covariance / (scale[..., :, None] * scale[..., None, :])


def inverse_root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A (D, D) and s (D,) of -1, 0 and 1 with A' diag(s) A = pinv(M): so that z' pinv(M) z = sum_i s_i (A z)_i^2.

    M (D, D) is symmetric. By Cholesky where it is positive and well conditioned. Otherwise by its eigenvalues, of
    which those within D eps of the largest one's size count as 0, as in torch.linalg.pinv. Negative ones keep their
    sign: FeCAM's shrinkage can make them of few samples.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if not failed and pivots.min() > _WELL_CONDITIONED * pivots.max():
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve_triangular(factor, eye, upper=False), torch.ones_like(pivots)
    values, vectors = torch.linalg.eigh(matrix)
    limit = len(matrix) * torch.finfo(matrix.dtype).eps * values.abs().max()
    signs = torch.where(values.abs() > limit, values.sign(), 0.0)
    return torch.where(signs == 0, 0.0, values.abs().rsqrt())[:, None] * vectors.T, signs


def squared_distances(features: Tensor, centres: Tensor, roots: Tensor, signs: Tensor) -> Tensor:
    """(C, B) sum_i s_ci (A_c (f - m_c))_i^2: features f (B, D), centres m_c and signs s_c (C, D), roots A_c (C, D, D).

    Of as many samples and classes at a time as fit a processor's cache; on a GPU of more, where a launch costs more.
    """
    classes, (samples, width) = len(centres), features.shape
    found = features.new_empty(classes, samples)
    room = _IN_CACHE if features.device.type == "cpu" else 64 * _IN_CACHE
    rows = max(1, min(samples, room // max(1, width)))
    at_once = max(1, min(classes, room // max(1, rows * width)))
    differences, whitened = features.new_empty(2, at_once, rows, width)
    for start in range(0, samples, rows):
        part = features[start : start + rows]
        for first in range(0, classes, at_once):
            those = slice(first, min(first + at_once, classes))
            delta = torch.sub(part, centres[those, None], out=differences[: those.stop - first, : len(part)])
            z = torch.bmm(delta, roots[those].mT, out=whitened[: those.stop - first, : len(part)])
            found[those, start : start + rows] = torch.bmm(z.square_(), signs[those, :, None]).squeeze(-1)
    return found
