import subprocess
from pathlib import Path

import cv2
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import ExifTags, Image

from common import video
from common.errors import UserError


@pytest.fixture
def clip() -> np.ndarray:
    """Ten frames of a bright square that moves right over a gradient, `[10, 48, 64, 3]` uint8."""
    frames = np.zeros((10, 48, 64, 3), np.uint8)
    frames[:] = np.linspace(0, 120, 64, dtype=np.uint8)[None, None, :, None]
    for i, frame in enumerate(frames):
        frame[16:32, 4 * i : 4 * i + 16] = (240, 60, 30)
    return frames


def test_video_survives_writing_and_reading(tmp_path, clip):
    video.write_video(tmp_path / "clip.mp4", clip, fps=16)
    read = video.read_video(tmp_path / "clip.mp4")
    assert read.shape == clip.shape
    assert np.abs(read.astype(int) - clip).mean() < 4
    assert [f.name for f in tmp_path.iterdir()] == ["clip.mp4"]


def test_lossless_video_gives_back_the_same_bytes_and_the_same_file(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (5, 47, 63, 3), np.uint8)
    for name in ("one.mkv", "two.mkv"):
        video.write_lossless(tmp_path / name, frames, fps=16)
    np.testing.assert_array_equal(video.read_video(tmp_path / "one.mkv"), frames)
    assert (tmp_path / "one.mkv").read_bytes() == (tmp_path / "two.mkv").read_bytes()
    video.write_lossless(tmp_path / "floats.mkv", frames / np.float32(255), fps=16)
    np.testing.assert_array_equal(video.read_video(tmp_path / "floats.mkv"), frames)


@pytest.mark.parametrize("rate", [8, 16, 24, 25, 30, 60])
def test_a_video_of_another_rate_keeps_its_speed(tmp_path, rate):
    """The frames are those of FFmpeg's filter `fps`, of which the original code of MAGI-1 makes use."""
    frames = np.arange(rate + 4, dtype=np.uint8).repeat(32 * 32 * 3).reshape(-1, 32, 32, 3)
    video.write_lossless(tmp_path / "given.mkv", frames, rate)
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(tmp_path / "given.mkv")]
    subprocess.run([*ffmpeg, "-vf", "fps=24", "-vcodec", "ffv1", str(tmp_path / "filtered.mkv")], check=True)
    read = video.read_video(tmp_path / "given.mkv", fps=24)
    np.testing.assert_array_equal(read, video.read_video(tmp_path / "filtered.mkv"))
    assert len(read) == round((rate + 4) * 24 / rate)
    np.testing.assert_array_equal(video.read_video(tmp_path / "given.mkv"), frames)


def test_each_frame_is_shown_from_its_time_stamp_on():
    assert video.shown_frames(np.array([3, 3.1, 3.2, 3.6]), 10).tolist() == [0, 1, 2, 2, 2, 2, 3]
    assert video.shown_frames(np.array([0.5]), 24).tolist() == [0]


def test_without_time_stamps_all_frames_are_taken():
    assert video.shown_frames(np.zeros(5), 24).tolist() == [0, 1, 2, 3, 4]


def test_a_relative_folder_may_have_a_colon(tmp_path, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run-12:30").mkdir()
    growing = video.GrowingVideo(Path("run-12:30/clip.mp4"), 16)
    for part in (clip[:4], clip[4:]):
        growing.append(part)
    assert len(video.read_video("run-12:30/clip.mp4")) == 10


def test_odd_sides_are_padded_to_even(tmp_path, clip):
    video.write_video(tmp_path / "odd.mp4", clip[:, :47, :63], fps=16)
    assert video.read_video(tmp_path / "odd.mp4").shape == (10, 48, 64, 3)


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    with pytest.raises(AttributeError):
        video.write_video(path, [*clip], fps=16)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_ffmpeg_complains_of_is_told(tmp_path, clip):
    with pytest.raises(OSError, match="ffmpeg failed: .*No such file or directory"):
        video.write_video(tmp_path / "nowhere" / "clip.mp4", clip, fps=16)


def test_an_ffmpeg_that_is_ended_is_told(tmp_path, clip, monkeypatch):
    killer = tmp_path / "ffmpeg"
    killer.write_text("#!/bin/sh\nkill -XFSZ $$\n")  # as a limit on the size of files does
    killer.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(killer))
    with pytest.raises(OSError, match="ffmpeg failed: it ended with code -25"):
        video.write_video(tmp_path / "clip.mp4", clip[:1], fps=16)


def test_floats_become_bytes():
    frames = np.array([-0.1, 0.0, 0.5, 1.0, 1.2])
    assert video.to_uint8(frames).tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("content", [b"", b"plain text, which FFmpeg would draw\n" * 50, bytes(range(256)) * 20])
def test_what_is_no_video_or_image_is_refused(tmp_path, content):
    path = tmp_path / "file.mp4"
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds no frame"):
        video.read_video(path)
    with pytest.raises(UserError, match="give a PNG or JPEG"):
        video.read_image(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.mp4"):
        video.read_video(tmp_path / "nowhere.mp4")
    with pytest.raises(UserError, match=r"nowhere.png.*No such file"):
        video.read_image(tmp_path / "nowhere.png")


def test_truncated_image_is_refused(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be read"):
        video.read_image(path)


def test_image_becomes_rgb(tmp_path):
    Image.new("RGBA", (8, 6), (10, 20, 30, 0)).save(tmp_path / "image.png")
    assert video.read_image(tmp_path / "image.png").getpixel((0, 0)) == (10, 20, 30)


def test_a_picture_taken_on_its_side_is_turned(tmp_path):
    frame = np.zeros((8, 16, 3), np.uint8)
    frame[:, :4] = 255  # left as stored, which the camera says is the top
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(frame).save(tmp_path / "photo.png", exif=exif)
    turned = np.asarray(video.read_image(tmp_path / "photo.png"))
    assert turned.shape == (16, 8, 3)
    assert (turned[:4] == 255).all() and not turned[4:].any()


def test_resize_keeps_proportions_and_centre():
    frame = np.zeros((40, 120, 3), np.uint8)
    frame[:, 40:80] = 255  # the middle square
    fitted = video.resize_and_crop(frame, 20, 20)
    assert fitted.shape == (20, 20, 3)
    assert fitted[:, 1:-1].min() == 255


def test_side_by_side_shows_both_videos_under_their_labels(clip):
    joined = video.side_by_side([clip, 255 - clip], [["exact", "100 %"], ["motioncache-slow", "45 %, 31.2 dB"]])
    height, width = joined.shape[1:3]
    assert height % 2 == 0 and width % 2 == 0 and len(joined) == 10
    bar = height - 48 * 7
    assert joined[0, bar + 7 * 20, 10].tolist() == clip[0, 20, 1].tolist()
    assert joined[0, bar + 7 * 20, width - 10].tolist() == (255 - clip[0, 20, 62]).tolist()
    assert joined[0, :bar, : width // 2].max() > 200 and joined[0, :bar, width // 2 :].max() > 200


def test_long_labels_fit_their_pane():
    bar = video.label_bar(["motioncache-t0.1-a0.6-k6-w5-input-residual_change"], 300)
    assert bar[:, -6:].max() == 24, "text runs over the edge"
    assert bar.max() > 200


def test_a_growing_video_is_whole_after_each_part(tmp_path, clip):
    """Every frame is there once, in order, and no frame changes when more come."""
    growing, shown = video.GrowingVideo(tmp_path / "clip.mp4", fps=16), clip[:0]
    for part in (clip[:4], clip[4:5], clip[5:]):
        growing.append(part)
        before, shown = shown, video.read_video(tmp_path / "clip.mp4")
        assert len(shown) == growing.frames
        np.testing.assert_array_equal(shown[: len(before)], before)
    assert np.abs(shown.astype(int) - clip).mean() < 4
    capture = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    times = [capture.get(cv2.CAP_PROP_POS_MSEC) for _ in clip if capture.read()[0]]
    np.testing.assert_allclose(np.diff(times), 1000 / 16, atol=0.1)
    growing.close()
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
