"""FlowCache's K/V compression: its scores, what it does to a cache, and that memory stays flat on both models."""

import math

import pytest
import torch
from magi_random import make_magi_pipeline
from skyreels_random import random_pipeline

from common.cache import Compression, KVCache, MotionCacheConfig, Write
from common.cache.compression import gather, importance, redundancy
from common.errors import UserError
from magi1_motioncache.attach import apply_motioncache as attach_magi
from skyreels_v2_motioncache import apply_motioncache, remove_motioncache

GRID = (2, 2, 3)
CHUNK = 12
# Everything is computed, each in its own way of deciding: what differs from exact is the compression alone.
ALWAYS = {
    "motioncache": MotionCacheConfig(distance="input", threshold=0.0, chunk_phase=1, warmup_steps=1),
    "flowcache": MotionCacheConfig(distance="input", threshold=0.0, alpha=1.0),
    "teacache": MotionCacheConfig(distance="input", threshold=0.0, method="teacache"),
}
CACHING = {
    "token level": MotionCacheConfig(distance="input", budget=0.5, chunk_phase=1, warmup_steps=1),
    "chunk level": MotionCacheConfig(distance="input", budget=0.5, alpha=1.0, warmup_steps=1),
    "teacache": MotionCacheConfig(distance="input", threshold=0.2, method="teacache", warmup_steps=1),
}


class TestScores:
    def test_redundancy_equals_the_similarity_matrix(self):
        key = torch.randn(2, 20, 3, 8)
        unit = key / key.norm(dim=-1, keepdim=True)
        matrix = torch.einsum("bihd,bjhd->bhij", unit, unit)
        matrix.diagonal(dim1=-2, dim2=-1).zero_()
        torch.testing.assert_close(redundancy(key), matrix.mean(-1).softmax(-1))

    @pytest.mark.parametrize("heads", [3, 6])
    def test_importance_equals_the_attention_map(self, heads):
        query, key = torch.randn(2, 300, heads, 8), torch.randn(2, 20, 3, 8)  # more queries than one block
        groups = heads // 3
        spread = key.repeat_interleave(groups, dim=2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, spread) / math.sqrt(8)
        attention = scores.unflatten(1, (3, groups)).amax(2).softmax(-1).mean(2)
        pooled = torch.stack([attention[..., max(i - 3, 0) : i + 4].amax(-1) for i in range(20)], dim=-1)
        torch.testing.assert_close(importance(query, key), pooled)

    @pytest.mark.parametrize("group", [1, 6, 12])
    def test_selection_keeps_the_best_groups_of_each_head_in_order(self, group):
        query, key = torch.randn(2, 12, 4, 8), torch.randn(2, 36, 2, 8)
        kept = Compression(1, CHUNK, group).select(query, key)
        score = 0.07 * importance(query, key) - 0.93 * redundancy(key)
        for sample in range(2):
            for head in range(2):
                means = score[sample, head].view(-1, group).mean(-1)
                best = means.argsort(descending=True)[: CHUNK // group].sort().values
                expected = (best[:, None] * group + torch.arange(group)).flatten()
                assert torch.equal(kept[sample, head], expected)

    def test_a_copied_key_goes_before_a_lone_one(self):
        key = torch.eye(24)[:, None].unsqueeze(0).clone()
        key[:, 12:] = key[:, 5:6]  # twelve keys like the sixth
        kept = Compression(1, CHUNK, 1).select(torch.zeros(1, 12, 1, 24), key)[0, 0].tolist()
        assert set(range(12)) - {5} < set(kept)


def test_a_config_says_what_is_kept():
    assert Compression.of(MotionCacheConfig(), GRID) is None
    groups = {g: Compression.of(MotionCacheConfig(kv_budget=3, kv_granularity=g), GRID) for g in ("token", "frame")}
    assert groups == {"token": Compression(3, CHUNK, 1), "frame": Compression(3, CHUNK, 6)}
    assert groups["frame"].budget == 36
    assert Compression.of(MotionCacheConfig(method="exact", kv_budget=3), GRID) is None  # exact stays exact
    with pytest.raises(UserError, match=r"kv_budget.*at least 1"):
        MotionCacheConfig(kv_budget=0)


def write(cache, key, value, at):
    """What the first layer of a cache returns for a write."""
    for layer in cache.open(at, key):
        rows = layer.update(key, value, at)
    return rows


def compress(cache, query, at):
    for layer in cache.look(0, at.end):
        layer.compress(query, at)


class TestCache:
    def test_kept_rows_move_and_later_writes_find_theirs(self):
        compression = Compression(1, CHUNK, 1)
        small, whole = KVCache(1, 2, 8, 5 * CHUNK, compression), KVCache(1, 2, 8, 5 * CHUNK)
        query = torch.randn(1, CHUNK, 4, 8)

        def both(chunk, tokens=None):
            count = CHUNK if tokens is None else len(tokens)
            key, value = torch.randn(2, 1, count, 2, 8).unbind(0)
            at = Write(chunk * CHUNK, CHUNK, tokens)
            return write(small, key, value, at), write(whole, key, value, at)

        for chunk in range(3):
            ours, reference = both(chunk)
            assert torch.equal(ours[0], reference[0])
        second = Write(CHUNK, CHUNK)
        keys, values = (store[:, : 2 * CHUNK] for store in reference)
        kept = compression.select(query, keys)
        compress(small, query, second)
        assert small.length(3 * CHUNK) == 2 * CHUNK
        ours, reference = both(2, torch.tensor([1, 7]))
        assert torch.equal(ours[0], torch.cat([gather(keys, kept), reference[0][:, 2 * CHUNK :]], dim=1))
        assert torch.equal(ours[1], torch.cat([gather(values, kept), reference[1][:, 2 * CHUNK :]], dim=1))
        ours, reference = both(3)
        assert torch.equal(ours[0][:, CHUNK:], reference[0][:, 2 * CHUNK :])
        assert small.bytes < whole.bytes

    def test_within_the_budget_nothing_is_lost(self):
        cache = KVCache(1, 2, 8, 4 * CHUNK, Compression(2, CHUNK, 1))
        key = torch.randn(1, 2 * CHUNK, 2, 8)
        for chunk in range(2):
            at = Write(chunk * CHUNK, CHUNK)
            keys, _ = write(cache, key[:, at.start : at.end], key[:, at.start : at.end], at)
            compress(cache, key, at)
        assert torch.equal(keys, key)

    def test_a_narrow_range_reads_the_latest_rows_that_were_kept(self):
        cache = KVCache(1, 2, 8, compression=Compression(2, CHUNK, 1))
        rows = torch.randn(5, 1, CHUNK, 2, 8)
        for chunk in range(5):
            write(cache, rows[chunk], rows[chunk], Write(chunk * CHUNK, CHUNK))
        compress(cache, torch.randn(1, CHUNK, 4, 8), Write(3 * CHUNK, CHUNK))
        (layer,) = cache.look(0, 5 * CHUNK)
        keys, _ = layer.read(0, 5 * CHUNK)
        assert keys.shape[1] == cache.length(5 * CHUNK) == 3 * CHUNK
        assert torch.equal(keys[:, 2 * CHUNK :], rows[4])
        narrow, _ = layer.read(3 * CHUNK, 5 * CHUNK)
        assert torch.equal(narrow, keys[:, CHUNK:])
        assert cache.length(5 * CHUNK, 3 * CHUNK) == 2 * CHUNK
        everything = torch.cat(list(rows[:4]), dim=1)
        for row in keys[0, : 2 * CHUNK, 0]:
            assert (everything[0, :, 0] == row).all(-1).any()
        cache.drop_before(4 * CHUNK)
        assert cache.length(5 * CHUNK) == 3 * CHUNK, "what compression has kept stays"


# -- the models --------------------------------------------------------------------------------------------------------


def skyreels(config: MotionCacheConfig, chunks: int = 4, steps: int = 6):
    """Final latents and trace of one window of that many chunks, 48 tokens each."""
    pipe, call = random_pipeline(layers=2)
    handle = apply_motioncache(pipe, config)
    frames = (2 * chunks - 1) * 4 + 1
    latents = call(num_frames=frames, base_num_frames=frames, num_inference_steps=steps, guidance_scale=1.0)
    remove_motioncache(pipe)
    return latents, handle.trace


def magi(config: MotionCacheConfig, chunks: int = 4, steps: int = 8, guided: bool = False):
    """Final latents and trace of a video of that many chunks, 8 tokens each, that see all history."""
    pipe = make_magi_pipeline(num_steps=steps, cfg_number=3 if guided else 1, noise2clean_kvrange=())
    pipe.set_progress_bar_config(disable=True)
    handle = attach_magi(pipe, config)
    latents = pipe(
        "a red circle",
        height=32,
        width=32,
        num_frames=8 * chunks,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames
    return latents, handle.trace


@pytest.mark.parametrize("run", [skyreels, magi])
@pytest.mark.parametrize("method", ALWAYS)
def test_a_budget_that_is_never_exceeded_changes_nothing(run, method):
    exact, _ = run(MotionCacheConfig.preset("exact"))
    ours, _ = run(ALWAYS[method].replace(kv_budget=4))
    assert (ours - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("run", [skyreels, magi])
@pytest.mark.parametrize("granularity", ["token", "frame", "chunk"])
@pytest.mark.parametrize("level", CACHING)
def test_works_with_every_level_of_caching(run, level, granularity):
    config = CACHING[level].replace(kv_granularity=granularity)
    free, trace = run(config, chunks=6)
    ours, compressed = run(config.replace(kv_budget=1), chunks=6)
    assert torch.isfinite(ours).all() and not torch.equal(ours, free)
    assert compressed.peak_bytes["kv"] < trace.peak_bytes["kv"]
    assert max(r.kv_tokens for r in compressed.records) < max(r.kv_tokens for r in trace.records)


@pytest.mark.parametrize("guided", [False, True])
def test_memory_stays_at_the_budget_magi(guided):
    config = ALWAYS["flowcache"].replace(kv_budget=2)
    lengths = (4, 16) if guided else (4, 16, 64)
    peaks = [magi(config, chunks, steps=4, guided=guided)[1] for chunks in lengths]
    assert peaks[-1].peak_bytes["kv"] == peaks[1].peak_bytes["kv"]
    grown = [magi(ALWAYS["flowcache"], chunks, steps=4, guided=guided)[1].peak_bytes["kv"] for chunks in (4, 16)]
    assert grown[1] > 1.5 * peaks[1].peak_bytes["kv"]
    # Four chunks at work and two worth of clean ones; in a pass that does not keep, also the chunk just finished.
    assert max(r.kv_tokens for r in peaks[-1].records) == (2 + 4 + guided) * 8


def test_memory_stays_at_the_budget_skyreels():
    config = ALWAYS["flowcache"].replace(kv_budget=2)
    peaks = {chunks: skyreels(config, chunks, steps=4)[1] for chunks in (4, 16, 64)}
    assert peaks[16].peak_bytes["kv"] == peaks[64].peak_bytes["kv"]
    chunks = peaks[64].peak_bytes["kv"] / (48 * 2 * 2 * 24 * 4)  # tokens, layers, K and V, channels, bytes
    # The budget, and those at work, of which one has just become clean: four steps, started two apart.
    assert chunks == 2 + 2
    assert max(r.kv_tokens for r in peaks[64].records) == (2 + 2) * 48
    free = {chunks: skyreels(ALWAYS["flowcache"], chunks, steps=4)[1].peak_bytes["kv"] for chunks in (4, 16)}
    assert free[16] == 4 * free[4]


def test_renewed_prefixes_cannot_be_compressed():
    pipe, _ = random_pipeline()
    with pytest.raises(UserError, match="use 'frozen'"):
        apply_motioncache(pipe, ALWAYS["flowcache"].replace(kv_budget=2), prefix_noise="fresh")


# -- in 8 bits ---------------------------------------------------------------------------------------------------------


def magi_guided(config: MotionCacheConfig):
    return magi(config, guided=True)


@pytest.mark.parametrize("run", [skyreels, magi, magi_guided])
@pytest.mark.parametrize("kv_budget", [None, 2])
def test_eight_bits_are_near_and_take_less_room(run, kv_budget):
    config = ALWAYS["flowcache"].replace(kv_budget=kv_budget)
    plain, trace = run(config)
    ours, packed = run(config.replace(kv_dtype="int8"))
    error = (ours - plain).abs().max() / plain.abs().max()
    assert 0 < error < 0.02
    width = 12 if run is skyreels else 32  # channels of a head
    assert packed.peak_bytes["kv"] * width * 4 == trace.peak_bytes["kv"] * (width + 1)


@pytest.mark.parametrize("run", [skyreels, magi])
def test_exact_keeps_its_keys_as_they_are(run):
    exact = MotionCacheConfig.preset("exact")
    (ours, kept), (plain, trace) = run(exact.replace(kv_dtype="int8")), run(exact)
    assert torch.equal(ours, plain) and kept.peak_bytes == trace.peak_bytes
    assert MotionCacheConfig(kv_dtype="int8").tag.endswith("-kvint8") and exact.replace(kv_dtype="int8").tag == "exact"
