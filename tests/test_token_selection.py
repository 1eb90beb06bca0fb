"""What selected tokens have in common with those computed among all, and guidance passes with each other."""

import pytest
import torch
from magi_random import make_magi_pipeline
from skyreels_random import LONG, random_pipeline

from common.cache import ChunkStep, Engine, MotionCacheConfig, Signals
from magi1_motioncache.attach import apply_motioncache as attach_magi
from skyreels_v2_motioncache import apply_motioncache

GRID = (2, 2, 4)
TOKENS = 16
STEPS = 12
SELECTING = MotionCacheConfig(
    alpha=0.2,
    warmup_steps=2,
    chunk_phase=1,
    threshold=0.4,
    distance="table",
    distance_table=(0.1,) * STEPS,
    score="residual_change",
    min_update_share=0.0,
    temporal_vote=False,
)


def turning(config: MotionCacheConfig, turns: list[list[int]], branches: tuple[str, ...]) -> dict[str, list]:
    """Denoise a chunk whose residual changes twice as fast in some tokens, for each branch its own.

    Returns by branch what the blocks were given at each step: None for all tokens, and "reuse" where they did not run.
    """
    engine = Engine(config)
    engine.start_window()
    seen = {branch: [] for branch in branches}
    pace = torch.full((len(branches), TOKENS, 1), 0.1)
    for row, fast in zip(pace, turns, strict=True):
        row[fast] = 0.2
    for step in range(STEPS):
        for place, branch in enumerate(branches):
            given = seen[branch]
            given.append("reuse")

            def blocks(x, index, now=(1 + pace[place]) ** step, given=given):
                given[-1] = index if index is None else index.tolist()
                return x + (now if index is None else now[index])

            call = ChunkStep(0, step, 0, branch, step, STEPS, 0.5, GRID, TOKENS)
            x = torch.zeros(1, TOKENS, 6)
            engine.run_blocks(call, Signals(x, latents=x), blocks)
            engine.finish(x)
    return seen


def test_passes_share_their_tokens_when_asked_to():
    branches, turns = ("cond", "uncond"), [[0, 1, 2, 3], [8, 9, 10, 11]]
    each = turning(SELECTING, turns, branches)
    assert each["cond"] != each["uncond"]
    shared = turning(SELECTING.replace(shared_selection=True), turns, branches)
    assert shared["cond"] == shared["uncond"] == each["cond"]
    assert any(isinstance(s, list) for s in shared["cond"])


def again_with_some(monkeypatch) -> list[float]:
    """Lets the engine run some of a chunk's tokens again behind each step that computed all; the differences."""
    found, run_blocks = [], Engine.run_blocks

    def twice(engine, step, signals, blocks, role="denoise"):
        outputs = run_blocks(engine, step, signals, blocks, role)
        some = torch.arange(1, step.tokens, 3)
        again = blocks(signals.inputs.index_select(1, some), some)
        found.append((again - outputs[:, some]).abs().max().item())
        return outputs

    monkeypatch.setattr(Engine, "run_blocks", twice)
    return found


ALL = MotionCacheConfig(distance="input", threshold=0.0, alpha=0.5, warmup_steps=1, score="input_change")


@pytest.mark.parametrize(
    ("kind", "block", "options"),
    [("t2v", 2, {}), ("t2v", 2, LONG), ("i2v", 2, {"addnoise_condition": 20}), ("t2v", 1, {})],
    ids=["a window", "windows", "a chunk of two noise levels", "one chunk"],
)
def test_selected_tokens_of_skyreels_are_computed_as_among_all(kind, block, options, monkeypatch):
    pipe, call = random_pipeline(kind, block)
    apply_motioncache(pipe, ALL)
    found = again_with_some(monkeypatch)
    call(**options)
    assert found and max(found) < 1e-4


@pytest.mark.parametrize("cfg_number", [1, 3])
def test_selected_tokens_of_magi_are_computed_as_among_all(cfg_number, monkeypatch):
    pipe = make_magi_pipeline(num_steps=4, cfg_number=cfg_number, window_size=2, noise2clean_kvrange=(2,))
    pipe.set_progress_bar_config(disable=True)
    attach_magi(pipe, ALL)
    found = again_with_some(monkeypatch)
    pipe("a red circle", height=32, width=48, num_frames=32, output_type="latent")
    assert found and max(found) < 1e-4
