"""Several processes that train one model."""

from .batch_norm import synchronise_batch_norm
from .replicas import replicate
from .shards import shard
from .shares import Share, share

__all__ = ["Share", "replicate", "shard", "share", "synchronise_batch_norm"]
