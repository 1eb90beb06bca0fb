"""Videos and images in and out of files, and two videos side by side."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from common.errors import UserError
from common.files import atomic_path

MIN_PANE_HEIGHT = 320
"""Smaller videos are enlarged in comparisons, so that a label fits over them."""


def read_image(path: Path | str) -> Image.Image:
    """An RGB image, turned as its EXIF data say.

    Raises:
        UserError: the file is missing or is not an image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError(f"image {str(path)!r} is not an image that can be read; give a PNG or JPEG file") from error
    except OSError as error:
        reason = error.strerror or "the file is damaged"
        raise UserError(f"image {str(path)!r} cannot be read: {reason}; give a PNG or JPEG file") from error


def read_video(path: Path | str, fps: float | None = None) -> np.ndarray:
    """A video's frames, `[frames, height, width, 3]` uint8 RGB.

    Args:
        fps: frames per second to take: frames are repeated or left out by their time stamps, so that what moves keeps
            its speed. With None, or in a file without time stamps, all frames as they are.

    Raises:
        UserError: the file is missing or holds no frame that can be decoded.
    """
    if not Path(path).is_file():
        raise UserError(f"video {str(path)!r} does not exist; give an MP4 file")
    capture = cv2.VideoCapture(_url(Path(path)))
    frames, times = [], []
    # FFmpeg takes any text file for a drawing in terminal characters.
    is_text = int(capture.get(cv2.CAP_PROP_FOURCC)) == cv2.VideoWriter.fourcc(*"ansi")
    try:
        while not is_text:
            ok, frame = capture.read()
            if not ok:
                break
            frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
            times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    finally:
        capture.release()
    if not frames:
        raise UserError(f"video {str(path)!r} holds no frame that can be decoded; give an MP4 file")
    kept = range(len(frames)) if fps is None else shown_frames(np.array(times), fps)
    return np.stack([frames[i] for i in kept])


def shown_frames(times: np.ndarray, fps: float) -> np.ndarray:
    """Which of a video's frames to show at each of the instants 0, 1 / fps, 2 / fps and so on, as long as it lasts.

    Args:
        times: `[frames]`, when each frame begins, in seconds.
        fps: instants per second. A frame belongs to the nearest one and is shown until the next frame's, as with
            FFmpeg's filter `fps`.

    Returns:
        `[instants]`, places in `times`; every frame once where `times` do not rise.
    """
    since_first = times - times[0]
    if not np.all(np.diff(since_first) > 0):
        return np.arange(len(times))
    last = np.median(np.diff(since_first)) if len(times) > 1 else 1 / fps  # how long the last frame is shown
    instants = np.floor(since_first * fps + 0.5)
    count = max(1, int((since_first[-1] + last) * fps + 0.5))
    return np.searchsorted(instants, np.arange(count), side="right") - 1


def resize_and_crop(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale `[h, w, 3]` uint8 to cover `height` by `width` and cut the centre out: nothing is stretched."""
    scale = max(height / frame.shape[0], width / frame.shape[1])
    size = (max(width, round(frame.shape[1] * scale)), max(height, round(frame.shape[0] * scale)))
    resized = cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return resized[top : top + height, left : left + width]


def fit_frames(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """`resize_and_crop` on each frame of `[frames, h, w, 3]` uint8."""
    return np.stack([resize_and_crop(frame, height, width) for frame in frames])


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] to 0..255, rounded; uint8 stays as it is."""
    return frames if frames.dtype == np.uint8 else np.clip(frames * 255 + 0.5, 0, 255).astype(np.uint8)


def write_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write an H.264 MP4 that any player and browser shows; the file appears only when it is whole.

    Args:
        path: ends in `.mp4`.
        frames: `[frames, height, width, 3]`, uint8 RGB or floats in [0, 1]. An odd last row or column is repeated, as
            the format needs even sides.
        fps: frames per second.
    """
    frames = to_uint8(frames)
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    options = ["-crf", "14", "-preset", "medium", "-movflags", "+faststart"]
    _encode(path, frames, fps, "libx264", "yuv420p", options)


def write_lossless(path: Path, frames: np.ndarray, fps: int) -> None:
    """Write frames so that `read_video` gives back the same bytes (FFV1, RGB); the file appears only when it is whole.

    Args:
        path: ends in `.mkv`.
        frames: `[frames, height, width, 3]`, uint8 RGB or floats in [0, 1], which are rounded to 8 bits.
        fps: frames per second.
    """
    # Bitexact leaves out a random number that the container would hold: the same frames give the same file.
    _encode(path, to_uint8(frames), fps, "ffv1", "bgr0", ["-fflags", "+bitexact", "-flags:v", "+bitexact"])


def _encode(path: Path, frames: np.ndarray, fps: int, codec: str, pixels: str, options: list[str]) -> None:
    height, width = frames.shape[1:3]
    source = ["-f", "rawvideo", "-vcodec", "rawvideo", "-s", f"{width}x{height}", "-pix_fmt", "rgb24", "-r", str(fps)]
    with atomic_path(path) as partial:
        encoder = ["-an", "-vcodec", codec, "-pix_fmt", pixels, *options, _url(partial)]
        _ffmpeg([*source, "-i", "-", *encoder], np.ascontiguousarray(frames).data.cast("B"))


def _url(path: Path) -> str:
    """A path as FFmpeg takes it whatever is in its name: of `12:30/video.mp4` it would take `12` for a protocol."""
    return str(path.absolute())


def _ffmpeg(arguments: Sequence[str], data: bytes | memoryview = b"") -> None:
    """Run ffmpeg on `data`.

    Raises:
        OSError: it failed; the message is ffmpeg's.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *arguments]
    # In a session of its own Ctrl-C does not reach it: a part that is being written becomes whole.
    done = subprocess.run(command, input=data, stderr=subprocess.PIPE, start_new_session=True)
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip() or f"it ended with code {done.returncode}"
        raise OSError(f"ffmpeg failed: {reason}")


class GrowingVideo:
    """A video file that is whole after each part that is added, so that it can be watched while the rest is made.

    Parts are encoded one by one, kept in a hidden folder beside the file until `close`, and joined without encoding
    them again; the joined file replaces the one before in one step.

    Args:
        path: ends in `.mp4`.
        fps: frames per second.
    """

    def __init__(self, path: Path, fps: int) -> None:
        self.path = path
        self.fps = fps
        self.frames = 0
        """Frames that are in the file."""
        self._parts: list[Path] = []
        self._folder = path.with_name(f".parts-{path.stem}")

    def append(self, frames: np.ndarray) -> None:
        """Add frames at the end; form and size as for `write_video`."""
        self._folder.mkdir(exist_ok=True)
        part = self._folder / f"{len(self._parts) + 1:04d}.mp4"
        write_video(part, frames, self.fps)
        self._parts.append(part)
        with atomic_path(self.path) as partial:
            if len(self._parts) == 1:
                shutil.copyfile(part, partial)
            else:
                _join(self._parts, partial)
        self.frames += len(frames)

    def close(self) -> None:
        """Remove the parts; the file stays."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _join(parts: Sequence[Path], path: Path) -> None:
    """Put MP4 files of the same encoder settings behind each other."""
    listing = parts[0].with_name("parts.txt")
    listing.write_text("".join(f"file '{part.name}'\n" for part in parts), encoding="utf-8")
    _ffmpeg(["-f", "concat", "-i", _url(listing), "-c", "copy", "-movflags", "+faststart", _url(path)])


def side_by_side(videos: Sequence[np.ndarray], labels: Sequence[Sequence[str]]) -> np.ndarray:
    """Videos of one shape beside each other, each under its label.

    Args:
        videos: `[frames, height, width, 3]` each, uint8 or floats in [0, 1].
        labels: for each video its lines of text; the first is larger.

    Returns:
        `[frames, height', width', 3]` uint8; small videos are enlarged by a whole factor.
    """
    factor = max(1, -(-MIN_PANE_HEIGHT // videos[0].shape[1]))
    panes = []
    for video, lines in zip(videos, labels, strict=True):
        pane = to_uint8(video).repeat(factor, axis=1).repeat(factor, axis=2)
        bar = label_bar(lines, pane.shape[2])
        panes.append(np.concatenate([np.broadcast_to(bar, (len(pane), *bar.shape)), pane], axis=1))
    gap = np.full((*panes[0].shape[:2], 4 + panes[0].shape[2] * len(panes) % 2, 3), 24, np.uint8)
    joined = [panes[0]]
    for pane in panes[1:]:
        joined += [gap, pane]
    return np.concatenate(joined, axis=2)


def label_bar(lines: Sequence[str], width: int) -> np.ndarray:
    """White text on black, `[height, width, 3]` uint8, as large as the width allows."""
    sizes = [20] + [15] * (len(lines) - 1)
    bar = Image.new("RGB", (width, sum(round(size * 1.5) for size in sizes) + 8), (24, 24, 24))
    draw = ImageDraw.Draw(bar)
    top = 5
    for line, size in zip(lines, sizes, strict=True):
        fitting = size
        while fitting > 8 and draw.textlength(line, font=ImageFont.load_default(fitting)) > width - 16:
            fitting -= 1
        draw.text((8, top), line, font=ImageFont.load_default(fitting), fill=(240, 240, 240))
        top += round(size * 1.5)
    return np.asarray(bar)
