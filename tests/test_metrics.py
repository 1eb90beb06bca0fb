import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from common import metrics
from common.errors import UserError


@pytest.fixture
def reference() -> np.ndarray:
    return np.random.default_rng(0).random((4, 24, 32, 3), np.float32)


def test_psnr_of_a_known_error(reference):
    assert metrics.psnr(reference + 0.1, reference) == pytest.approx(20.0, abs=1e-3)


def test_psnr_is_the_mean_over_frames(reference):
    noisy = reference + np.array([0.1, 0.01, 0.1, 0.01], np.float32)[:, None, None, None]
    assert metrics.psnr(noisy, reference) == pytest.approx(30.0, abs=1e-2)
    frames = [peak_signal_noise_ratio(r, n, data_range=1.0) for r, n in zip(reference, noisy, strict=True)]
    assert metrics.psnr(noisy, reference) == pytest.approx(np.mean(frames), abs=1e-3)


def test_equal_videos_get_the_largest_psnr(reference):
    assert metrics.psnr(reference, reference) == pytest.approx(metrics.MAX_PSNR)
    assert metrics.ssim(reference, reference) == pytest.approx(1.0)


def test_bytes_and_floats_agree(reference):
    as_bytes = (reference * 255).round().astype(np.uint8)
    as_floats = as_bytes / np.float32(255)
    other = 1 - reference
    assert metrics.psnr(as_bytes, other) == pytest.approx(metrics.psnr(as_floats, other))


def test_ssim_falls_with_blur_more_than_with_brightness(reference):
    blurred = (reference + np.roll(reference, 1, axis=2)) / 2
    brighter = reference * 0.95
    assert metrics.ssim(blurred, reference) < 0.9 < metrics.ssim(brighter, reference) < 1


def test_ssim_on_a_constant_shift_is_the_formula():
    a, b = np.full((1, 16, 16, 3), 0.5, np.float32), np.full((1, 16, 16, 3), 0.6, np.float32)
    c1 = 0.01**2
    assert metrics.ssim(a, b) == pytest.approx((2 * 0.5 * 0.6 + c1) / (0.5**2 + 0.6**2 + c1), abs=1e-4)


def test_shapes_must_agree(reference):
    with pytest.raises(ValueError, match="different shapes"):
        metrics.psnr(reference[:3], reference)


def test_paired_difference_is_student_t():
    ours, theirs = [30.0, 28.0, 33.0, 25.0], [29.0, 27.5, 31.0, 25.5]
    difference = metrics.paired_difference(ours, theirs)
    # differences 1, .5, 2, -.5: mean .75, sd 1.0408, t(.975, 3) = 3.1824
    assert difference.mean == pytest.approx(0.75)
    assert difference.half_width == pytest.approx(3.1824 * 1.0408 / 2, abs=1e-3)
    assert difference.half_width > difference.mean
    assert str(difference) == "+0.75 ± 1.66"


def test_pairing_removes_what_prompts_share():
    base = np.random.default_rng(0).normal(30, 8, 16)
    noise = np.random.default_rng(1).normal(0, 0.2, 16)
    difference = metrics.paired_difference(base + 0.5 + noise, base)
    assert difference.mean > difference.half_width


class Brightness(torch.nn.Module):
    """In place of the learned distance: how much darker the first is, per pixel, in halves of the range."""

    def forward(self, video, reference):
        assert video.shape[0] <= metrics.LPIPS_BATCH and video.shape[1] == 3
        return (reference - video).mean(1, keepdim=True) / 2


def test_lpips_averages_over_pixels_and_frames_of_uneven_batches():
    reference = np.full((metrics.LPIPS_BATCH + 3, 12, 16, 3), 200, np.uint8)
    video = reference.copy()
    video[-3:] -= 51  # a fifth of the range, in the frames of the last batch
    found = metrics.lpips(video, reference, Brightness(), torch.device("cpu"))
    assert found == pytest.approx(0.2 * 3 / (metrics.LPIPS_BATCH + 3), rel=1e-5)
    with pytest.raises(ValueError, match="different shapes"):
        metrics.lpips(video[1:], reference, Brightness(), torch.device("cpu"))


def test_lpips_without_its_packages_names_the_command(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -r requirements-lpips.txt"):
        metrics.load_lpips(torch.device("cpu"))


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [2.0]), ([1.0, 2.0], [1.0, 2.0, 3.0])])
def test_too_few_or_unpaired_values_are_refused(ours, theirs):
    with pytest.raises(ValueError, match="paired difference"):
        metrics.paired_difference(ours, theirs)
