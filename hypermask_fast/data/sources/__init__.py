"""Readers of data sets as they are published: each returns `RawImages` or raises InputError naming the
file."""

from .cifar import read_cifar10, read_cifar100
from .digits import read_digits
from .images import MissingFiles, RawImages
from .mnist import read_mnist
from .tiny_imagenet import read_tiny_imagenet

__all__ = [
    "MissingFiles",
    "RawImages",
    "read_cifar10",
    "read_cifar100",
    "read_digits",
    "read_mnist",
    "read_tiny_imagenet",
]
