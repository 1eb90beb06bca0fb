"""What the engine remembers from chunk to chunk and from window to window, on stand-in chunks, and what it forgets."""

import pytest
import torch

from common.cache import ChunkStep, Engine, MotionCacheConfig, Signals
from common.cache.distance import log_snr

GRID, TOKENS, STEPS = (2, 2, 4), 16, 12
FRAME = TOKENS // 2
TOKENWISE = MotionCacheConfig(distance="input", warmup_steps=2, chunk_phase=0, alpha=0.2, budget=0.25)


def at(chunk: int, step: int, branch: str = "cond", window: int = 0) -> ChunkStep:
    return ChunkStep(window, step, chunk, branch, step, STEPS, 1 - (step + 0.5) / STEPS, GRID, TOKENS)


def run(engine: Engine, step: ChunkStep, x: torch.Tensor, change: torch.Tensor | float = 0.0, role="denoise"):
    """One call whose block stack adds `change` to its input; the tokens that it was given."""
    given = ["none"]

    def blocks(tokens, index):
        given[0] = "all" if index is None else index
        return tokens + (change if index is None or isinstance(change, float) else change[:, index])

    outputs = engine.run_blocks(step, Signals(x, latents=x), blocks, role)
    engine.finish(outputs)
    return given[0], outputs


def frames(*values: float) -> torch.Tensor:
    """A chunk whose frames have one value each, `[1, tokens, 3]`."""
    return torch.tensor(values).repeat_interleave(FRAME).view(1, TOKENS, 1).expand(-1, -1, 3).clone()


def weights(engine: Engine, moved: int, frame: slice) -> list[list[int]]:
    """By frame, the tokens with the greatest weight in a chunk 1 of ones, but for one place in some of its frames."""
    x = frames(1.0, 1.0)
    x.view(2, FRAME, 3)[frame, moved] = 3.0
    for step in range(2):
        run(engine, at(1, step), x)
    found = engine.state(1, "cond").weights.view(2, FRAME)
    return [(row == row.max()).nonzero().flatten().tolist() for row in found]


@pytest.mark.parametrize("score", ["output_motion", "latent_motion"])
@pytest.mark.parametrize("denoised", [True, False], ids=["denoised", "given"])
def test_the_first_frame_of_a_chunk_is_compared_with_the_last_of_the_chunk_before(score, denoised):
    engine = Engine(TOKENWISE.replace(score=score))
    engine.start_window()
    if denoised:  # the frame of its last noisy step counts, not that of the pass that makes its K/V final
        for step in range(2):
            run(engine, at(0, step), frames(5.0, 1.0))
    last = frames(5.0, 1.0)
    if denoised:
        last[:, FRAME + 2] = 9.0
    run(engine, at(0, STEPS), last, role="refresh")
    engine.release(0, "cond")
    assert weights(engine, moved=6, frame=slice(None)) == [[6], list(range(FRAME))]


def test_without_a_chunk_before_the_first_frame_has_the_seconds_weights():
    engine = Engine(TOKENWISE)
    engine.start_window()
    assert weights(engine, moved=6, frame=slice(1, 2)) == [[6], [6]]


@pytest.mark.parametrize(("extrapolation", "of"), [("logsnr", log_snr), ("sigma", float)])
def test_reused_values_follow_the_line_over_their_own_time(extrapolation, of):
    engine = Engine(TOKENWISE.replace(alpha=1.0, budget=None, threshold=100.0, extrapolation=extrapolation))
    engine.start_window()
    x = torch.randn(1, TOKENS, 3, generator=torch.Generator().manual_seed(0))
    for step in range(8):
        residual = 3.0 * of(at(0, step).sigma) - 2.0
        given, outputs = run(engine, at(0, step), x, residual)
        assert given == ("all" if step < 2 else "none")
        torch.testing.assert_close(outputs, x + residual, rtol=1e-4, atol=1e-4)


def test_tokens_are_selected_from_the_first_step_after_warmup():
    engine = Engine(TOKENWISE)
    engine.start_window()
    given = [run(engine, at(0, step), frames(1.0, 2.0) * 1.1**step)[0] for step in range(4)]
    assert given[:2] == ["all", "all"] and [len(tokens) for tokens in given[2:]] == [TOKENS // 4] * 2


def test_each_tokens_input_is_that_of_its_own_last_computation():
    engine = Engine(TOKENWISE.replace(score="input_change"))
    engine.start_window()
    expected = torch.zeros(1, TOKENS, 3)
    for step in range(6):
        x = torch.randn(1, TOKENS, 3, generator=torch.Generator().manual_seed(step))
        given, _ = run(engine, at(0, step), x)
        chosen = slice(None) if isinstance(given, str) else given
        expected[:, chosen] = x[:, chosen]
        assert torch.equal(engine.state(0, "cond").last_input, expected)
    assert not isinstance(given, str)


def computed(engine: Engine, window: int, first: int, steps: int = STEPS) -> list[list[int] | str]:
    """Which tokens four chunks from `first` on compute in a window, call by call."""
    engine.start_window()
    found = []
    chunks = range(first, first + 4)
    noise = [torch.randn(1, TOKENS, 3, generator=torch.Generator().manual_seed(place)) for place in range(4)]
    for step in range(steps):
        for branch in ("cond", "uncond"):
            calls = [(at(chunk, step, branch, window), x + step) for chunk, x in zip(chunks, noise, strict=True)]
            if engine.decides_jointly:
                engine.announce([(call, Signals(x)) for call, x in calls], branch)
            for call, x in calls:
                given, _ = run(engine, call, x, change=0.1 * step)
                found.append(given if isinstance(given, str) else given.tolist())
    return found


@pytest.mark.parametrize(
    "config",
    [
        MotionCacheConfig(distance="input", alpha=1.0, threshold=0.6, warmup_steps=1, grading=0.9),
        TOKENWISE.replace(shared_selection=True),
        MotionCacheConfig(distance="input", method="teacache", threshold=0.6, warmup_steps=1),
    ],
    ids=["graded", "shared", "teacache"],
)
@pytest.mark.parametrize("steps", [STEPS, 3], ids=["whole", "interrupted"])
def test_a_window_is_decided_as_if_it_were_the_first(config, steps):
    alone = computed(Engine(config), 1, first=2)
    engine = Engine(config)
    computed(engine, 0, first=0, steps=steps)
    assert computed(engine, 1, first=2) == alone
    assert len({str(given) for given in alone}) > 1


def test_finished_chunks_leave_one_frame_behind():
    engine = Engine(TOKENWISE)
    engine.start_window()
    held = []
    for chunk in range(6):
        for step in range(3):
            run(engine, at(chunk, step), frames(1.0, 2.0))
        run(engine, at(chunk, STEPS), frames(1.0, 2.0), role="refresh")
        engine.release(chunk, "cond")
        held.append(engine.memory())
    frame = FRAME * 3 * 4
    assert held == [{"kv": 0, "values": 0, "signals": frame}] * 6
