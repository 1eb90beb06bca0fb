"""What the generator says of the stock pipeline without running all of it."""

import pytest
import torch
from skyreels_random import LONG, random_pipeline

from common.generator import Denoised
from skyreels_v2_motioncache.generate import Generator
from skyreels_v2_motioncache.settings import RunSettings
from skyreels_v2_motioncache.windows import plan_windows


def generator(**options) -> Generator:
    pipe, _ = random_pipeline()
    settings = RunSettings(
        **{
            **{"model": "random", "prompt": "", "height": 32, "width": 48, "num_frames": 29, "base_num_frames": 29},
            **{"steps": 8, "ar_step": 2, "causal_block_size": 2, "max_sequence_length": 8},
            **options,
        }
    )
    windows = plan_windows("text", settings.num_frames, settings.base_num_frames, settings.overlap_history, 2)
    return Generator(pipe, settings, windows)


def test_stock_time_is_scaled_up_without_the_first_iteration():
    single = generator()
    measured = Denoised(torch.zeros(1), [9.0, 10.0, 11.0])
    assert single.iterations == [8 + 3 * 2]
    assert single.stock.seconds(measured) == pytest.approx(14.0)


def test_windows_of_one_size_cost_the_same_per_iteration():
    long = generator(**LONG)
    assert len(long.iterations) == 3
    assert long.stock.seconds(Denoised(torch.zeros(1), [1.0, 3.0])) == pytest.approx(2.0 * sum(long.iterations))
    assert long.stock.tokens == 2 * sum(long.iterations) * 8 * 4 * 6
