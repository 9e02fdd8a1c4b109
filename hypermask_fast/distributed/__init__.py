"""Several processes that train one model."""

from .replicas import replicate

__all__ = ["replicate"]
