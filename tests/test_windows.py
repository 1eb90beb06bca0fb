"""How a long video is cut into windows: as the stock pipeline cuts it."""

import pytest
from PIL import Image

from skyreels_v2_motioncache.loading import load_pipeline
from skyreels_v2_motioncache.windows import Window, plan_windows, video_frames


def test_windows_of_the_published_run():
    assert plan_windows("text", 177, 97, 17, 5) == [Window(0, 25, 0), Window(20, 25, 5)]


def test_windows_by_kind():
    assert plan_windows("text", 97, 97, 17, 5) == [Window(0, 25, 0)]
    assert plan_windows("text", 257, 97, 17, 5) == [Window(0, 25, 0), Window(20, 25, 5), Window(40, 25, 5)]
    assert plan_windows("text", 137, 97, 17, 5) == [Window(0, 25, 0), Window(20, 15, 5)]
    assert plan_windows("image", 177, 97, 17, 5)[0].prefix == 1
    assert plan_windows("video", 77, 97, 17, 5) == [Window(0, 20, 5)]
    assert plan_windows("video", 137, 97, 17, 5) == [Window(0, 25, 5), Window(20, 15, 5)]


@pytest.mark.parametrize("kind", ["text", "image", "video"])
@pytest.mark.parametrize("num_frames", [33, 45, 69, 81, 93])
def test_windows_are_those_of_the_stock_pipeline(tiny_pipeline_folder, kind, num_frames):
    """Listen to the pipeline as it makes its schedules, and let it denoise nothing."""
    pipe = load_pipeline(tiny_pipeline_folder, kind)
    pipe.set_progress_bar_config(disable=True)
    seen = []
    make_matrix = pipe.generate_timestep_matrix

    def listen(frames, steps, base, ar_step, prefix, block):
        seen.append((frames, prefix))
        return make_matrix(frames, steps, base, ar_step, prefix, block)

    def stop(pipe, i, t, tensors):
        pipe._interrupt = True
        return {}

    pipe.generate_timestep_matrix = listen
    given = {
        "text": {},
        "image": {"image": Image.new("RGB", (16, 16))},
        "video": {"video": [Image.new("RGB", (16, 16))] * 9},
    }
    pipe(
        prompt="a red circle",
        **given[kind],
        height=16,
        width=16,
        num_frames=num_frames,
        base_num_frames=45,
        overlap_history=9,
        num_inference_steps=2,
        ar_step=1,
        causal_block_size=3,
        max_sequence_length=8,
        output_type="latent",
        callback_on_step_end=stop,
    )
    assert seen == [(w.frames, w.prefix) for w in plan_windows(kind, num_frames, 45, 9, 3)]


def test_latent_frames_decode_to_video_frames():
    assert [video_frames(n) for n in (1, 5, 25, 30)] == [1, 17, 97, 117]
