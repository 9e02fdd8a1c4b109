"""Several processes that train one model."""

from .replicas import replicate
from .shards import shard
from .shares import Share, share

__all__ = ["Share", "replicate", "shard", "share"]
