"""How far one video is from another, and how sure we are of a difference between two methods."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from common.errors import UserError

MAX_PSNR = 100.0
"""PSNR in dB given to frames that are equal up to float rounding, where the formula goes to infinity."""


def psnr(video: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, computed per frame and averaged over frames.

    Args:
        video, reference: `[frames, height, width, 3]`, uint8 or floats in [0, 1].

    Raises:
        ValueError: the shapes differ.
    """
    video, reference = _pair(video, reference)
    errors = np.square(video - reference).mean(axis=(1, 2, 3), dtype=np.float64)
    return float(np.mean(-10 * np.log10(np.maximum(errors, 10 ** (-MAX_PSNR / 10)))))


def ssim(video: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004: Gaussian window, σ = 1.5), averaged over channels and frames.

    Args:
        video, reference: `[frames, height, width, 3]`, uint8 or floats in [0, 1]; at least 11 pixels high and wide.

    Raises:
        ValueError: the shapes differ, or the frames are smaller than the window.
    """
    video, reference = _pair(video, reference)
    scores = [
        structural_similarity(
            a, b, data_range=1.0, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(video, reference, strict=True)
    ]
    return float(np.mean(scores))


LPIPS_PACKAGES = ("lpips", "torchvision")
LPIPS_INSTALL = "pip install -r requirements-lpips.txt"
LPIPS_BATCH = 8
"""Frames whose features are held at the same time."""


@torch.no_grad()
def lpips(video: np.ndarray, reference: np.ndarray, network: nn.Module, device: torch.device) -> float:
    """Learned perceptual distance (Zhang et al. 2018), averaged over pixels and frames; 0 for equal videos.

    Args:
        video, reference: `[frames, height, width, 3]`, uint8 or floats in [0, 1].
        network: of `load_lpips`: two batches `[frames, 3, height, width]` in [-1, 1] to `[frames, 1, height, width]`.
        device: of the network.

    Raises:
        ValueError: the shapes differ.
    """
    pair = _pair(video, reference)
    total = 0.0
    for start in range(0, len(video), LPIPS_BATCH):
        a, b = (_signed(frames[start : start + LPIPS_BATCH]).to(device) for frames in pair)
        total += float(network(a, b).mean(dim=(1, 2, 3)).double().sum())
    return total / len(video)


def has_lpips() -> bool:
    """Whether what `load_lpips` needs is installed."""
    return all(importlib.util.find_spec(package) is not None for package in LPIPS_PACKAGES)


def load_lpips(device: torch.device) -> nn.Module:
    """The network of the papers' scorer: AlexNet, a distance per pixel. Its weights are fetched on first use.

    Raises:
        UserError: its packages are not installed, or AlexNet's weights cannot be fetched.
    """
    if not has_lpips():
        raise UserError(f"LPIPS needs the packages {' and '.join(LPIPS_PACKAGES)}; install them: {LPIPS_INSTALL}")
    import lpips as package  # optional, and slow to import

    try:
        return package.LPIPS(net="alex", spatial=True, verbose=False).eval().to(device)
    except OSError as error:
        raise UserError(f"LPIPS: AlexNet's weights cannot be fetched ({error}); connect, or use --no-lpips") from error


def _signed(frames: np.ndarray) -> Tensor:
    """`[frames, height, width, 3]` in [0, 1] to `[frames, 3, height, width]` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))) * 2 - 1


@dataclass(frozen=True)
class Difference:
    """A mean with its 95 % interval, `mean ± half_width`, over `count` pairs."""

    mean: float
    half_width: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.half_width:.2f}"


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Mean of `ours - theirs`, with Student's t interval over the pairs.

    Prompts differ far more from each other than methods do, so only the same prompt and seed are compared.

    Raises:
        ValueError: fewer than two pairs, or lists of different lengths.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(f"paired difference needs two lists of one length, at least 2: got {len(ours)}, {len(theirs)}")
    differences = np.subtract(ours, theirs)
    spread = differences.std(ddof=1) / np.sqrt(len(differences))
    quantile = stats.t.ppf(0.975, df=len(differences) - 1)
    return Difference(float(differences.mean()), float(quantile * spread), len(differences))


def _pair(video: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if video.shape != reference.shape:
        raise ValueError(f"videos of different shapes: {video.shape} and {reference.shape}")
    return _unit(video), _unit(reference)


def _unit(video: np.ndarray) -> np.ndarray:
    return video / np.float32(255) if video.dtype == np.uint8 else video.astype(np.float32, copy=False)
