"""MAGI-1 in diffusers' style: transformer, autoencoder, sampler and pipeline, one chunk at a time.

The model knows no caching method: a `Denoiser` decides what is run.
"""

from magi1_motioncache.captions import ChunkCaptions
from magi1_motioncache.config import SamplingConfig
from magi1_motioncache.denoiser import Denoiser, ExactDenoiser
from magi1_motioncache.pipeline import Magi1Pipeline
from magi1_motioncache.plan import ChunkCall, Pass, Role, SamplingPlan
from magi1_motioncache.sampler import FinishedChunk, Magi1Sampler
from magi1_motioncache.special_tokens import SpecialTokenOptions, SpecialTokens
from magi1_motioncache.transformer import Magi1Transformer3DModel
from magi1_motioncache.vae import AutoencoderViTMagi1

__all__ = [
    "AutoencoderViTMagi1",
    "ChunkCall",
    "ChunkCaptions",
    "Denoiser",
    "ExactDenoiser",
    "FinishedChunk",
    "Magi1Pipeline",
    "Magi1Sampler",
    "Magi1Transformer3DModel",
    "Pass",
    "Role",
    "SamplingConfig",
    "SamplingPlan",
    "SpecialTokenOptions",
    "SpecialTokens",
]
