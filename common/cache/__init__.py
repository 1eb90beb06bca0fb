"""Caching for block-causal video diffusion: motion scoring, token masks, residual reuse, K/V. Knows no model.

`engine.Engine` is what a model's adapter talks to; `config.MotionCacheConfig` is what a user sets.
"""

from common.cache.compression import Compression
from common.cache.config import MotionCacheConfig
from common.cache.engine import Engine
from common.cache.kv import KVCache, Write
from common.cache.policy import ChunkStep, Signals
from common.cache.staging import Staging
from common.cache.trace import Record, Trace

__all__ = [
    "ChunkStep",
    "Compression",
    "Engine",
    "KVCache",
    "MotionCacheConfig",
    "Record",
    "Signals",
    "Staging",
    "Trace",
    "Write",
]
