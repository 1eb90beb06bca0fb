"""What a window's plan says of its chunks, on a schedule written down by hand."""

import pytest
import torch

from skyreels_v2_motioncache.plan import WindowPlan


def plan(timesteps, step_index, update_mask, num_steps, prefix_frames=0, block=2) -> WindowPlan:
    matrices = torch.tensor(timesteps, dtype=torch.float32), torch.tensor(step_index), torch.tensor(update_mask).bool()
    return WindowPlan(*matrices, num_steps, prefix_frames, block)


TEXT = plan(  # two chunks of two frames, the second one step behind; three iterations of two steps
    timesteps=[[999, 999, 999, 999], [600, 600, 999, 999], [0, 0, 600, 600]],
    step_index=[[1, 1, 0, 0], [2, 2, 1, 1], [3, 3, 2, 2]],
    update_mask=[[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]],
    num_steps=2,
)
IMAGE = plan(  # the first frame was given: its chunk's other frame is denoised beside it
    timesteps=[[0, 900, 999, 999], [0, 500, 900, 900], [0, 0, 500, 500]],
    step_index=[[3, 1, 0, 0], [3, 2, 1, 1], [3, 3, 2, 2]],
    update_mask=[[0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]],
    num_steps=2,
    prefix_frames=1,
)


def test_chunks_begin_go_on_and_end():
    statuses = [[TEXT.status(iteration, chunk) for chunk in range(2)] for iteration in range(3)]
    assert statuses == [["active", "waiting"], ["active", "active"], ["finished", "active"]]
    assert [TEXT.work(iteration, ()) for iteration in range(3)] == [[0], [0, 1], [0, 1]]
    assert TEXT.work(2, {0}) == [1]  # its K/V are clean
    assert [TEXT.step(i, c) for i, c in ((0, 0), (1, 0), (1, 1), (2, 1))] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [TEXT.sigma(i, c) for i, c in ((0, 0), (1, 0), (2, 1))] == pytest.approx([0.999, 0.6, 0.6])


def test_the_noise_level_of_a_chunk_with_a_given_frame_is_that_of_the_others():
    assert [IMAGE.sigma(i, c) for i, c in ((0, 0), (1, 0), (1, 1), (2, 1))] == pytest.approx([0.9, 0.5, 0.9, 0.5])
    assert IMAGE.is_mixed(0) and IMAGE.is_prefix(0) and not IMAGE.is_mixed(1) and not IMAGE.is_prefix(1)
    assert (IMAGE.shared_timestep(1, 0), IMAGE.shared_timestep(1, 1)) == (None, 900.0)


def test_a_last_chunk_is_not_renewed_when_it_is_done():
    ended = plan([[999, 999], [0, 0]], [[1, 1], [2, 2]], [[1, 1], [0, 0]], num_steps=1)
    assert (ended.status(1, 0), ended.work(1, ())) == ("finished", [])


def test_another_loop_than_the_planned_one_is_noticed():
    IMAGE.check(0, torch.tensor([[20.0, 900, 999, 999]]))  # the pipeline adds noise to what was given
    IMAGE.check(1, torch.zeros(1, 4))  # values are compared once
    for iteration, timestep in (
        (0, [[0.0, 901, 999, 999]]),
        (0, [[0.0, 900, 999, 998]]),
        (0, [[0.0, 900, 999]]),
        (1, [[0.0, 500, 900, 900, 900]]),
    ):
        with pytest.raises(RuntimeError, match=f"iteration {iteration}: the transformer was called with timesteps"):
            IMAGE.check(iteration, torch.tensor(timestep))
    with pytest.raises(RuntimeError, match="called 4 times in a window of 3 iterations"):
        IMAGE.check(3, torch.zeros(1, 4))
