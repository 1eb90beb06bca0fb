"""How the stock pipelines cut a video into windows, worked out before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from common.settings import Kind


@dataclass(frozen=True)
class Window:
    """One call of the denoising loop.

    Attributes:
        start: its first latent frame in the whole video.
        frames: its latent frames.
        prefix: how many of them are given, by the window before or by an input video.
    """

    start: int
    frames: int
    prefix: int


def latent_frames(frames: int, temporal_factor: int = 4) -> int:
    """Latent frames of a video of `frames`: the first frame is one, each `temporal_factor` more make another."""
    return (frames - 1) // temporal_factor + 1


def video_frames(latents: int, temporal_factor: int = 4) -> int:
    """The video frames that `latents` latent frames decode to."""
    return (latents - 1) * temporal_factor + 1


def plan_windows(
    kind: Kind,
    num_frames: int,
    base_num_frames: int,
    overlap_history: int | None,
    causal_block_size: int,
    temporal_factor: int = 4,
) -> list[Window]:
    """The windows of a video, as diffusers' `SkyReelsV2DiffusionForcing*Pipeline.__call__` makes them.

    Args:
        kind: `"video"` always goes by windows, with the given video's end as the first one's prefix.
        num_frames, base_num_frames, overlap_history: in video frames; no overlap means one window.
        causal_block_size: a prefix that does not fill blocks is cut to those that it fills.
    """
    total = latent_frames(num_frames, temporal_factor)
    if kind != "video" and (overlap_history is None or num_frames <= base_num_frames):
        return [Window(0, total, 1 if kind == "image" else 0)]
    base, overlap = latent_frames(base_num_frames, temporal_factor), latent_frames(overlap_history, temporal_factor)
    stride = base - overlap
    count = 1 + (total - base - 1) // stride + 1
    prefix = overlap - overlap % causal_block_size
    windows = []
    for i in range(count):
        frames = base if i == 0 and kind != "video" else min(total - i * stride, base)
        given = {"text": 0, "image": 1, "video": prefix}[kind] if i == 0 else prefix
        windows.append(Window(i * stride, frames, given))
    return windows
