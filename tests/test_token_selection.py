"""Which tokens a chunk computes when its own sum of changes says how many, and the K/V of the others."""

import pytest
import torch
from magi_random import make_magi_pipeline
from skyreels_random import LONG, random_pipeline

from common.cache import ChunkStep, Engine, MotionCacheConfig, Signals
from common.cache.kv_line import KeyValueLine
from magi1_motioncache.adapter import CachedDenoiser
from magi1_motioncache.attach import apply_motioncache as attach_magi
from skyreels_v2_motioncache import apply_motioncache, remove_motioncache

GRID = (2, 2, 4)
TOKENS = 16
STEPS = 12
SELECTING = MotionCacheConfig(
    alpha=1.0,
    warmup_steps=2,
    chunk_phase=1,
    threshold=0.4,
    distance="table",
    distance_table=(0.1,) * STEPS,
    score="residual_change",
)


def turning(config: MotionCacheConfig, turns: list[list[int]], chunks: int = 1, branches: tuple[str, ...] = ("cond",)):
    """Denoise chunks whose residual changes twice as fast in some tokens, for each branch its own.

    Returns the engine, and by chunk and branch what the blocks were given at each step (None for all tokens).
    """
    engine = Engine(config)
    engine.start_window()
    seen = {(chunk, branch): [] for chunk in range(chunks) for branch in branches}
    pace = torch.full((len(branches), TOKENS, 1), 0.1)
    for row, fast in zip(pace, turns, strict=True):
        row[fast] = 0.2
    for step in range(STEPS):
        for place, branch in enumerate(branches):
            for chunk in range(chunks):
                given = seen[chunk, branch]
                given.append("reuse")

                def blocks(x, index, now=(1 + pace[place]) ** step, given=given):
                    given[-1] = index if index is None else index.tolist()
                    return x + (now if index is None else now[index])

                call = ChunkStep(0, step, chunk, branch, step, STEPS, 0.5, GRID, TOKENS)
                x = torch.zeros(1, TOKENS, 6)
                engine.run_blocks(call, Signals(x, latents=x), blocks)
                engine.finish(x)
    return engine, seen


def test_tokens_come_due_with_the_chunks_sum_and_the_fastest_go_first():
    # After two steps of warm-up and one whole update, half of τ is due at every second step.
    engine, seen = turning(SELECTING.replace(selection="due", selection_share=0.5), [list(range(4, 12))])
    steps = seen[0, "cond"]
    assert steps[:6] == [None, None, "reuse", "reuse", "reuse", None]
    assert steps[6:8] == ["reuse", list(range(4, 12))]
    assert [s == "reuse" for s in steps[8:]] == [True, False, True, False]
    assert {r.tokens for r in engine.trace.records[6:]} == {0, TOKENS // 2}


def test_slow_tokens_have_their_turn_when_fast_ones_were_just_computed():
    _, seen = turning(SELECTING.replace(selection="due", selection_share=0.25), [list(range(4))])
    computed = [set(s) for s in seen[0, "cond"][6:] if isinstance(s, list)]
    assert computed[0] == set(range(4))
    assert set().union(*computed) > set(range(4))


def test_a_light_step_lies_halfway_between_two_whole_ones():
    _, seen = turning(SELECTING.replace(selection="between", selection_share=0.25), [[1, 5, 9, 13]])
    light = [1, 5, 9, 13]
    assert seen[0, "cond"] == [None, None, *["reuse"] * 3, None, "reuse", light, "reuse", None, "reuse", light]


def test_squares_are_chosen_together():
    config = SELECTING.replace(selection="between", selection_share=0.25, selection_block=2)
    _, seen = turning(config, [[0]])
    assert seen[0, "cond"][7] == [0, 1, 4, 5]


def test_the_first_chunks_can_be_kept_whole():
    config = SELECTING.replace(selection="between", whole_chunks=1)
    _, seen = turning(config, [[0, 1, 2, 3]], chunks=2)
    assert not any(isinstance(s, list) for s in seen[0, "cond"])
    assert any(isinstance(s, list) for s in seen[1, "cond"])


@pytest.mark.parametrize(
    "how", [{"selection": "due"}, {"selection": "between"}, {"alpha": 0.2, "temporal_vote": False}], ids=str
)
def test_passes_share_their_tokens_when_asked_to(how):
    branches, turns = ("cond", "uncond"), [[0, 1, 2, 3], [8, 9, 10, 11]]
    config = SELECTING.replace(min_update_share=0.0, **how)
    _, each = turning(config, turns, branches=branches)
    assert each[0, "cond"] != each[0, "uncond"]
    _, shared = turning(config.replace(shared_selection=True), turns, branches=branches)
    assert shared[0, "cond"] == shared[0, "uncond"] == each[0, "cond"]
    assert any(isinstance(s, list) for s in shared[0, "cond"])


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


LINE = {
    "alpha": 1.0,
    "grading": 0.0,
    "extrapolation": "logsnr",
    "kv_extrapolation": True,
    "chunk_phase_unit": "updates",
}
LIGHT = {"selection": "due", "selection_share": 0.25, "score": "reuse_error", "shared_selection": True}


def test_selected_tokens_of_every_magi_pass_attend_to_their_whole_chunk(monkeypatch):
    found = []
    real = KeyValueLine.complete

    def spy(self, layer, chunk, rows, time, tokens):
        whole = real(self, layer, chunk, rows, time, tokens)
        found.append((rows[0].shape[1], whole[0].shape[1]))
        return whole

    monkeypatch.setattr(KeyValueLine, "complete", spy)
    pipe = make_magi_pipeline(num_steps=12, cfg_number=3, window_size=2, noise2clean_kvrange=(2,))
    pipe.set_progress_bar_config(disable=True)
    config = MotionCacheConfig(
        distance="table", distance_table=(0.1,) * 12, threshold=0.3, warmup_steps=1, **LINE, **LIGHT
    )
    cached = []

    def denoiser(*given) -> CachedDenoiser:
        cached.append(CachedDenoiser(*given, config.replace(chunk_phase=1)))
        return cached[0]

    pipe("a red circle", height=32, width=32, num_frames=16, output_type="latent", denoiser=denoiser)
    selected = {r.branch for r in cached[0].trace.records if r.decision == "select"}
    assert selected == {"text", "null", "uncond"}
    tokens = cached[0].trace.records[0].tokens_total
    assert any(count < tokens for count, _ in found) and {whole for _, whole in found} == {tokens}
    for branch in selected:  # a chunk's are forgotten at its clean pass, which the last one does not have
        assert set(cached[0].caches[branch].line._buffers) == {tokens}


def test_selected_tokens_of_skyreels_attend_to_keys_on_the_line():
    pipe, call = random_pipeline(layers=1)
    config = MotionCacheConfig(
        distance="table", distance_table=(0.1,) * 12, threshold=0.3, warmup_steps=1, **LINE, **LIGHT
    )
    videos = {}
    for extended in (False, True):
        handle = apply_motioncache(pipe, config.replace(chunk_phase=1, kv_extrapolation=extended))
        videos[extended] = call(num_inference_steps=12)
        decided = [(r.decision, r.tokens) for r in handle.trace.records]
        peak = handle.trace.peak_bytes["kv"]
        if not extended:
            assert "select" in dict(decided)
            before, lower = decided, peak
        remove_motioncache(pipe)
    assert decided == before and peak > lower
    assert not torch.equal(videos[False], videos[True])
