"""Decisions step by step, on a stand-in model whose block stack is a function of the input."""

import pytest
import torch
from magi_random import make_magi_pipeline
from skyreels_random import random_pipeline

from common.cache import ChunkStep, Engine, MotionCacheConfig, Signals
from common.cache.policy import MotionCachePolicy
from common.errors import UserError
from magi1_motioncache.adapter import CachedDenoiser
from skyreels_v2_motioncache import apply_motioncache

GRID = (2, 2, 4)
TOKENS = 16
STEPS = 12


def drive(config: MotionCacheConfig, chunks: int = 1, change: float = 0.1, moving: int | None = 3):
    """Denoise some chunks; block outputs of spatial position `moving` differ from frame to frame.

    Returns the engine, and per step the token indices that the blocks were given (None for all).
    """
    engine = Engine(config)
    engine.start_window()
    seen = []
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, TOKENS // 2, 6, generator=generator).repeat(1, 2, 1)  # the same frame twice
    motion = torch.zeros(1, TOKENS, 6)
    if moving is not None:
        motion.view(1, *GRID, 6)[:, 1].flatten(1, 2)[:, moving] = 2.0

    def blocks(x, index):
        seen[-1].append(index if index is None else index.tolist())
        return x * 1.5 + (motion if index is None else motion[:, index])

    for step in range(STEPS):
        for chunk in range(chunks):
            seen.append([])
            sigma = 1 - (step + 0.5) / STEPS
            call = ChunkStep(0, step, chunk, "cond", step, STEPS, sigma, GRID, TOKENS * (chunk + 1))
            x = base * (1 + change) ** step
            engine.run_blocks(call, Signals(x, latents=x), blocks)
            engine.finish(x)
    return engine, [s[0] if s else "reuse" for s in seen]


def decisions(engine: Engine) -> list[str]:
    return [r.decision for r in engine.trace.records]


BASE = MotionCacheConfig(distance="input", polynomial=None, warmup_steps=2, chunk_phase=2, threshold=0.25)


def test_exact_computes_everything():
    engine, seen = drive(MotionCacheConfig.preset("exact"))
    assert seen == [None] * STEPS
    assert engine.trace.totals() == {"tokens_computed": STEPS * TOKENS, "tokens_total": STEPS * TOKENS}


def test_chunk_phase_accumulates_and_restarts():
    # Each step moves the input by 10 %: three steps reach 0.25, then A starts again.
    engine, _ = drive(BASE.replace(alpha=1.0))
    assert decisions(engine) == ["full"] * 2 + ["reuse", "reuse", "full"] * 3 + ["reuse"]


def test_token_phase_selects_tokens_that_move():
    # alpha 0: still tokens have weight 0 and are never due again; the moving position is due every third step.
    config = BASE.replace(alpha=0.0, min_update_share=0.0, temporal_vote=False)
    engine, seen = drive(config)
    chosen = [s for s in seen if isinstance(s, list)]
    assert decisions(engine)[:8] == ["full", "full", "reuse", "reuse", "full", "reuse", "reuse", "full"]
    assert chosen and all(s == [3, 11] for s in chosen)


def test_minimum_share_lets_accumulators_grow():
    config = BASE.replace(alpha=0.0, min_update_share=0.4, temporal_vote=False)
    engine, seen = drive(config)
    assert not any(isinstance(s, list) for s in seen)
    assert engine.state(0, "cond").accumulated[3] > 0.25


def test_alpha_one_is_the_chunk_level_decision_whatever_else_is_set():
    plain = drive(BASE.replace(alpha=1.0, temporal_vote=False, min_update_share=0.0))[0]
    voted = drive(BASE.replace(alpha=1.0, chunk_phase=0))[0]
    assert decisions(plain) == decisions(voted)
    assert "select" not in decisions(plain)


class Listening(MotionCachePolicy):
    """The policy, which also notes what it was given and what it said."""

    def __init__(self, config: MotionCacheConfig) -> None:
        super().__init__(config)
        self.heard: dict[tuple, list[tuple[int, torch.Tensor, str]]] = {}

    def decide(self, step, state, signals):
        choice = super().decide(step, state, signals)
        heard = self.heard.setdefault((step.window, step.branch, step.chunk), [])
        heard.append((step.step, signals.inputs.clone(), choice.decision))
        return choice


def flowcache(inputs: list[torch.Tensor], first: int, threshold: float, warmup: int) -> list[str]:
    """FlowCache's rule for one chunk, computed directly: which steps are computed, `first` being the first step."""
    decisions, total = [], 0.0
    for i, now in enumerate(inputs):
        if i > 0 and first + i >= warmup:
            total += float((now - inputs[i - 1]).abs().mean() / inputs[i - 1].abs().mean())
            if total < threshold:
                decisions.append("reuse")
                continue
        decisions.append("full")
        total = 0.0
    return decisions


def run_skyreels(config: MotionCacheConfig) -> Listening:
    pipe, call = random_pipeline(layers=1)
    handle = apply_motioncache(pipe, config)
    listening = handle.hook.engine.policy = Listening(config)
    call(num_inference_steps=12)
    return listening


def run_magi(config: MotionCacheConfig) -> Listening:
    pipe = make_magi_pipeline(num_steps=12, cfg_number=1, window_size=3, noise2clean_kvrange=(3, 2))
    pipe.set_progress_bar_config(disable=True)
    listening = Listening(config)

    def denoiser(transformer, captions, plan) -> CachedDenoiser:
        cached = CachedDenoiser(transformer, captions, plan, config)
        cached.engine.policy = listening
        return cached

    pipe("a red circle", height=32, width=32, num_frames=32, output_type="latent", denoiser=denoiser)
    return listening


@pytest.mark.parametrize("run", [run_skyreels, run_magi])
@pytest.mark.parametrize("others", [{"temporal_vote": False, "min_update_share": 0.0}, {"chunk_phase": 0}], ids=str)
def test_alpha_one_decides_as_flowcache_on_both_models(run, others):
    config = BASE.replace(alpha=1.0, threshold=0.4, **others)
    heard = run(config).heard
    assert len(heard) >= 4
    said = set()
    for steps in heard.values():
        first = steps[0][0]
        assert [s[0] for s in steps] == list(range(first, first + len(steps)))
        assert [s[2] for s in steps] == flowcache([s[1] for s in steps], first, 0.4, 2)
        said |= {s[2] for s in steps}
    assert said == {"full", "reuse"}


def test_budget_takes_the_same_number_at_every_step():
    config = BASE.replace(budget=0.25, alpha=0.2)
    engine, _ = drive(config)
    counts = [r.tokens for r in engine.trace.records if r.decision == "select"]
    assert counts and set(counts) == {4}


def test_budget_in_the_chunk_phase_spaces_whole_steps():
    engine, _ = drive(BASE.replace(budget=0.25, alpha=1.0))
    assert decisions(engine) == ["full"] * 2 + ["reuse", "reuse", "reuse", "full"] * 2 + ["reuse"] * 2


def computed_per_chunk(config: MotionCacheConfig, chunks: int, first: int = 0) -> list[int]:
    """Tokens computed of each chunk, when the chunks from number `first` on are denoised together."""
    engine = Engine(config)
    engine.start_window()
    for step in range(STEPS):
        x = torch.full((1, TOKENS, 6), 1.1**step)
        for chunk in range(first, first + chunks):
            engine.run_blocks(
                ChunkStep(0, step, chunk, "cond", step, STEPS, 0.5, GRID, TOKENS), Signals(x), lambda v, _: v * 1.5
            )
            engine.finish(x)
    counts = dict.fromkeys(range(first, first + chunks), 0)
    for record in engine.trace.records:
        counts[record.chunk] += record.tokens
    return list(counts.values())


@pytest.mark.parametrize("how_much", [{"threshold": 0.25}, {"budget": 0.3}], ids=str)
def test_grading_computes_first_chunks_more_often_and_later_ones_alike(how_much):
    even = computed_per_chunk(BASE.replace(alpha=1.0, **how_much), 6)
    assert len(set(even)) == 1
    counts = computed_per_chunk(BASE.replace(alpha=1.0, grading=0.6, **how_much), 6)
    assert counts == sorted(counts, reverse=True) and counts[0] > even[0] > counts[3] == counts[4] == counts[5]
    # A window whose first chunks are given grades those that are denoised.
    assert computed_per_chunk(BASE.replace(alpha=1.0, grading=0.6, **how_much), 6, first=2) == counts


def test_grading_also_holds_for_tokens():
    config = BASE.replace(alpha=0.5, chunk_phase=0, min_update_share=0.0, score="input_change", grading=0.6)
    counts = computed_per_chunk(config, 4)
    assert counts[0] > counts[3]


def test_buckets_round_up():
    config = BASE.replace(alpha=0.0, min_update_share=0.0, temporal_vote=False, bucket=4)
    _, seen = drive(config)
    chosen = [s for s in seen if isinstance(s, list)]
    assert chosen and all(len(s) == 4 and {3, 11} <= set(s) for s in chosen)


def test_a_table_decides_by_step():
    table = (0.0,) * 5 + (1.0,) + (0.0,) * 6
    engine, _ = drive(BASE.replace(alpha=1.0, distance="table", distance_table=table))
    assert decisions(engine) == ["full"] * 2 + ["reuse"] * 3 + ["full"] + ["reuse"] * 6


def test_steps_as_the_unit_of_the_chunk_phase():
    config = BASE.replace(budget=0.25, alpha=0.2, chunk_phase=6, chunk_phase_unit="steps")
    engine, _ = drive(config)
    assert "select" not in decisions(engine)[:6]
    assert set(decisions(engine)[6:]) == {"select"}


SCORES = ["output_motion", "latent_motion", "input_change", "residual_change", "random"]


@pytest.mark.parametrize("score", SCORES)
def test_every_score_gives_weights_between_alpha_and_one(score):
    engine, _ = drive(BASE.replace(score=score, budget=0.5), chunks=2)
    for chunk in range(2):
        weights = engine.state(chunk, "cond").weights
        assert weights.shape == (TOKENS,)
        assert weights.min() >= 0.6 - 1e-6 and weights.max() <= 1 + 1e-6


def test_random_weights_depend_on_chunk_and_step_alone():
    before = torch.get_rng_state()
    policy = MotionCachePolicy(BASE.replace(score="random", chunk_phase=0))

    def weights(chunk, step, branch):
        state = Engine(policy.config).state(chunk, branch)
        x = torch.randn(1, TOKENS, 6, generator=torch.Generator().manual_seed(step))
        policy.observe(ChunkStep(0, step, chunk, branch, step, STEPS, 0.5, GRID, TOKENS), state, None, Signals(x), x)
        return state.weights

    assert weights(1, 5, "cond").equal(weights(1, 5, "uncond"))
    assert not weights(1, 5, "cond").equal(weights(1, 6, "cond"))
    assert not weights(1, 5, "cond").equal(weights(2, 5, "cond"))
    assert torch.get_rng_state().equal(before)


def test_residuals_are_reused():
    config = BASE.replace(alpha=1.0, threshold=100.0)
    engine = Engine(config)
    x = torch.randn(1, TOKENS, 6)
    outputs = []
    for step in range(4):
        call = ChunkStep(0, step, 0, "cond", step, 4, 0.5, GRID, TOKENS)
        outputs.append(engine.run_blocks(call, Signals(x + step), lambda v, _: v + 7))
        engine.finish(x)
    torch.testing.assert_close(outputs[3], x + 3 + 7)
    assert decisions(engine) == ["full", "full", "reuse", "reuse"]


def test_velocities_are_reused_and_selected_rows_are_new():
    config = BASE.replace(reuse="velocity", score="latent_motion", budget=0.25, alpha=0.0, chunk_phase=0)
    engine = Engine(config)
    latents = torch.zeros(1, TOKENS, 2)
    latents[:, 8:] = torch.arange(8.0).view(1, 8, 1)
    for step in range(4):
        call = ChunkStep(0, step, 0, "cond", step, 4, 0.5, GRID, TOKENS)
        outputs = engine.run_blocks(
            call, Signals(torch.ones(1, TOKENS, 6) * 1.1**step, latents=latents), lambda v, _: v
        )
        velocity = engine.finish(torch.full((1, TOKENS, 3), float(step)))
    assert outputs.shape == (1, TOKENS, 6)
    assert velocity.shape == (1, TOKENS, 3)
    rows = velocity[0, :, 0]
    assert rows.eq(3.0).sum() == 4  # a quarter computed at the last step
    assert rows.min() >= 1.0  # the others as they were when last computed


def test_updates_are_reused_with_the_old_steps_size():
    engine = Engine(BASE.replace(alpha=1.0, threshold=100.0, reuse="update"))
    x = torch.ones(1, TOKENS, 6)
    velocities = []
    for step, dt in enumerate([0.1, 0.2, 0.4]):
        call = ChunkStep(0, step, 0, "cond", step, 3, 0.5, GRID, TOKENS, dt=dt)
        engine.run_blocks(call, Signals(x), lambda v, _: v)
        velocities.append(engine.finish(torch.full((1, TOKENS, 3), 1.0 + step)))
    assert decisions(engine) == ["full", "full", "reuse"]
    torch.testing.assert_close(velocities[1], torch.full((1, TOKENS, 3), 2.0))
    torch.testing.assert_close(velocities[2] * 0.4, velocities[1] * 0.2)  # x_new - x_old, as it was


def test_updates_need_a_step_size():
    engine = Engine(BASE.replace(alpha=1.0, reuse="update"))
    x = torch.ones(1, TOKENS, 6)
    engine.run_blocks(ChunkStep(0, 0, 0, "cond", 0, 3, 0.5, GRID, TOKENS), Signals(x), lambda v, _: v)
    with pytest.raises(ValueError, match="step size"):
        engine.finish(x)


def test_an_unknown_polynomial_is_refused_and_names_the_ways_out():
    with pytest.raises(UserError, match=r"set polynomial \(\[1, 0\].*'input' or 'table'"):
        Engine(MotionCacheConfig())
    Engine(MotionCacheConfig(polynomial=(1.0, 0.0)))
    Engine(MotionCacheConfig.preset("exact"))


@pytest.mark.parametrize("extrapolation", ["hold", "sigma"])
def test_memory_is_counted_and_its_peak_kept(extrapolation):
    class Held:
        bytes = 1000

    engine = Engine(BASE.replace(alpha=1.0, threshold=0.0, extrapolation=extrapolation))
    engine.watch(Held())
    x = torch.ones(1, TOKENS, 6)
    for step in range(2):
        engine.run_blocks(ChunkStep(0, step, 0, "cond", step, 3, 0.5, GRID, TOKENS), Signals(x), lambda v, _: v)
        engine.finish(x)
    copies = 1 if extrapolation == "hold" else 2
    values = copies * TOKENS * (6 + 1) * 4  # a value per channel and a time per token, in float32
    signals = TOKENS * 6 * 4 + TOKENS * 4  # the last input and the accumulators
    assert engine.memory() == {"kv": 1000, "values": values, "signals": signals}
    engine.start_window()
    assert sum(engine.memory().values()) == 0
    assert engine.trace.peak_bytes == {
        "kv": 1000,
        "values": values,
        "signals": signals,
        "total": 1000 + values + signals,
    }


def test_a_refresh_decides_nothing_and_frees_the_residual():
    engine = Engine(BASE)
    x = torch.randn(1, TOKENS, 6)
    call = ChunkStep(0, 0, 0, "cond", 0, 4, 0.5, GRID, TOKENS)
    engine.run_blocks(call, Signals(x), lambda v, _: v)
    engine.finish(x)
    engine.run_blocks(call, Signals(x), lambda v, _: v, "refresh")
    engine.finish(x)
    engine.release(0, "cond")
    assert [r.role for r in engine.trace.records] == ["denoise", "refresh"]
    assert engine.state(0, "cond").buffer.last is None
    assert engine.state(0, "cond").last_frame is not None


def test_maps_are_kept_when_asked():
    config = BASE.replace(alpha=0.0, min_update_share=0.0, temporal_vote=False)
    engine = Engine(config)
    engine.trace.keep_maps = True
    x = torch.randn(1, TOKENS, 6)
    engine.run_blocks(ChunkStep(0, 0, 0, "cond", 0, 4, 0.5, GRID, TOKENS), Signals(x), lambda v, _: v)
    (maps,) = engine.trace.maps
    assert maps.weights.shape == GRID and maps.computed.all()
