"""Several processes that train one model."""

from .replicas import replicate
from .shares import Share, share

__all__ = ["Share", "replicate", "share"]
