"""What a user sets. One frozen dataclass, validated on construction, with a YAML form and named presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from common.checks import check_keys, check_range, check_type, near_miss
from common.errors import UserError


@dataclass(frozen=True)
class MotionCacheConfig:
    """How a chunk's denoising steps are shortened.

    The defaults are the published method (MotionCache, arXiv 2605.01725). What is a matter of the model alone, such as
    `polynomial`, is filled in by the model's adapter where it is known.

    Args:
        method: `"exact"` computes every token of every active chunk at every step; `"motioncache"` caches, each chunk
            or token on its own; `"teacache"` decides once per iteration for all active chunks together.
        threshold: τ of Eq. 13. A token is computed when its accumulated, weighted change reaches it. Larger is faster
            and less faithful.
        alpha: α of Eq. 10, the smallest weight a token can have. 1 gives every token the same weight, which makes the
            decision per chunk: FlowCache (arXiv 2602.10825).
        warmup_steps: first steps of a chunk that are computed whole, for TeaCache first iterations of a window (its
            retention steps). The public code computes five with its `warmup 4`: steps 0 to 4.
        chunk_phase: length of the chunk-level phase between warm-up and token phase (K).
        chunk_phase_unit: whether `chunk_phase` counts computed steps (`"updates"`) or all steps since the chunk began,
            warm-up included (`"steps"`).
        min_update_share: a step that wants fewer tokens than this share, but some, computes none and lets the
            accumulators grow. 0 turns it off.
        temporal_vote: compute a spatial position in all frames of the chunk when more than half of them want it, and
            in none otherwise.
        budget: share of a chunk's tokens to compute at each step of the token phase, the most urgent ones, instead of
            comparing with `threshold`; in the chunk phase a whole chunk is computed each time its share adds up to
            one. Shapes are the same at every step and nothing is read back from the device. Not for TeaCache.
        grading: how much more often a video's first chunks are computed than its later ones, whose errors spread less:
            `threshold` counts times 1 - grading for the first chunk that is denoised, times 1 + grading for the fourth
            and all after it, in even steps between (see `mask.graded`). 0 treats all alike, as published. A `budget`
            is divided by the same factor. Not for TeaCache.
        shared_selection: guidance passes of a chunk's step compute the tokens that the first of them chose. Where one
            pass computes a token and another reuses it, their errors no longer cancel, and guidance multiplies what is
            left. False as published.
        distance: what Δ of Eq. 12 measures between this step and the previous one: `"modulation"` (relative L1 of the
            time modulation, rescaled by `polynomial`), `"input"` (relative L1 of the embedded input) or `"table"`
            (`distance_table`, measured beforehand).
        polynomial: coefficients, highest power first, applied to the relative L1 of the modulation; `(1, 0)` leaves it
            as it is. `None` takes the one that the adapter knows for the model.
        distance_table: Δ per step, for `distance="table"`: entry k is the mean relative change of the residual from
            step k-1 to step k, or what the result loses when step k is reused (`common.cache.calibration`). For another
            number of steps it is resampled.
        score: what the weights are made of: `"output_motion"` (inter-frame difference of the block stack's outputs),
            `"latent_motion"` (of the noisy latents), `"input_change"` (the token's own input since it was last
            computed), `"residual_change"` (relative change of its cached value when last measured) or `"random"` (a
            number drawn anew at every step of a chunk, the same in all its guidance passes and in every run: what
            choosing well is compared with).
        reuse: what a reused token takes from the cache: `"residual"` (block stack output minus input), `"velocity"`
            (the model's output) or `"update"` (output times step size, `x_new - x_old` of an Euler step: reused
            unchanged it carries the old step's size along).
        extrapolation: `"hold"` uses the cached value as it is; `"sigma"` and `"logsnr"` extend the last two computed
            values linearly over σ or over λ = log((1-σ)/σ). They keep two values per token instead of one.
        extrapolation_weight: share of the extended change that is added to the held value: 1 follows the line, less
            trusts it less.
        bucket: numbers of selected tokens are rounded up to a multiple of this; the surplus goes to the next most
            urgent tokens. Keeps shapes few for compiled blocks.
        kv_budget: chunks' worth of clean K/V to keep per KV head (FlowCache's compression, see `compression`); `None`
            keeps all. `method="exact"` always keeps all.
        kv_granularity: whether tokens are kept one by one, or whole frames or chunks.
        kv_dtype: what K/V are kept in: `"model"` as the model has them, `"int8"` in 8 bits with a scale for each token
            and head, which takes half the room of bfloat16. `method="exact"` always keeps them as they are.
        state_device: where K/V wait between uses: on the model's device, or in main memory (`"cpu"`).

    Raises:
        UserError: a value is outside its range, or two settings contradict each other.

    Example:
        >>> MotionCacheConfig.preset("slow").replace(alpha=1.0).tag
        'motioncache-t0.1-a1-k6-w5-modulation'
    """

    method: Literal["exact", "motioncache", "teacache"] = "motioncache"
    threshold: float = 0.1
    alpha: float = 0.6
    warmup_steps: int = 5
    chunk_phase: int = 6
    chunk_phase_unit: Literal["updates", "steps"] = "updates"
    min_update_share: float = 0.4
    temporal_vote: bool = True
    budget: float | None = None
    grading: float = 0.0
    shared_selection: bool = False
    distance: Literal["modulation", "input", "table"] = "modulation"
    polynomial: tuple[float, ...] | None = None
    distance_table: tuple[float, ...] | None = None
    score: Literal["output_motion", "latent_motion", "input_change", "residual_change", "random"] = "output_motion"
    reuse: Literal["residual", "velocity", "update"] = "residual"
    extrapolation: Literal["hold", "sigma", "logsnr"] = "hold"
    extrapolation_weight: float = 1.0
    bucket: int = 1
    kv_budget: int | None = None
    kv_granularity: Literal["token", "frame", "chunk"] = "token"
    kv_dtype: Literal["model", "int8"] = "model"
    state_device: Literal["model", "cpu"] = "model"

    def __post_init__(self) -> None:
        for name in ("polynomial", "distance_table"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for name, hint in get_type_hints(type(self)).items():
            check_type(name, getattr(self, name), hint)
        check_range("threshold", self.threshold, 0.0, None)
        check_range("alpha", self.alpha, 0.0, 1.0)
        check_range("warmup_steps", self.warmup_steps, 1, None)
        check_range("chunk_phase", self.chunk_phase, 0, None)
        check_range("min_update_share", self.min_update_share, 0.0, 1.0)
        check_range("bucket", self.bucket, 1, None)
        if self.kv_budget is not None:
            check_range("kv_budget", self.kv_budget, 1, None)
        if self.budget is not None:
            check_range("budget", self.budget, 0.01, 1.0)
            if self.method == "teacache":
                raise UserError(f"budget: {self.budget:g} is not allowed for method 'teacache'; set threshold instead")
        check_range("extrapolation_weight", self.extrapolation_weight, 0.0, 1.0)
        check_range("grading", self.grading, 0.0, 0.95)
        if self.grading and self.method == "teacache":
            raise UserError(
                f"grading: {self.grading:g} is not allowed for method 'teacache', which decides once for all chunks; "
                "set it to 0"
            )
        if self.distance == "table" and not self.distance_table:
            raise UserError(
                "distance: 'table' needs distance_table, one Δ per denoising step; measure one or use 'input'"
            )
        if self.reuse != "residual" and self.score == "output_motion" and self.token_level:
            raise UserError(
                f"score: 'output_motion' needs every token's block output, which reuse {self.reuse!r} skips; "
                "use score 'latent_motion' or reuse 'residual'"
            )

    @property
    def token_level(self) -> bool:
        """Whether tokens of one chunk can be treated differently. With α = 1 Eq. 13 cannot tell them apart."""
        return self.method == "motioncache" and self.alpha < 1.0

    @property
    def tag(self) -> str:
        """A compact name of the settings that matter, for file names and tables."""
        if self.method == "exact":
            return "exact"
        how_much = f"t{self.threshold:g}" if self.budget is None else f"b{self.budget:g}"
        unit = "s" if self.chunk_phase_unit == "steps" else ""
        per_token = [f"a{self.alpha:g}", f"k{self.chunk_phase}{unit}"] if self.method == "motioncache" else []
        parts = [self.method, how_much, *per_token, f"w{self.warmup_steps}", self.distance]
        if self.grading:
            parts.append(f"g{self.grading:g}")
        default = type(self)()
        if self.min_update_share != default.min_update_share:
            parts.append(f"m{self.min_update_share:g}")
        if not self.temporal_vote:
            parts.append("novote")
        if self.shared_selection:
            parts.append("shared")
        if self.bucket != default.bucket:
            parts.append(f"bucket{self.bucket}")
        parts += [
            str(getattr(self, n))
            for n in ("score", "reuse", "extrapolation")
            if getattr(self, n) != getattr(default, n)
        ]
        if self.extrapolation != "hold" and self.extrapolation_weight != 1.0:
            parts.append(f"x{self.extrapolation_weight:g}")
        if self.kv_budget is not None:
            parts.append(f"kv{self.kv_budget}{self.kv_granularity}")
        if self.kv_dtype != "model":
            parts.append(f"kv{self.kv_dtype}")
        return "-".join(parts)

    def replace(self, **changes: Any) -> MotionCacheConfig:
        """A copy with some settings changed, validated again."""
        return type(self).from_dict({**dataclasses.asdict(self), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as written to YAML and JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MotionCacheConfig:
        """Build from a YAML mapping.

        Raises:
            UserError: an unknown key (with the nearest known one), or a value that is not allowed.
        """
        check_keys("cache setting", values, [f.name for f in dataclasses.fields(cls)])
        return cls(**values)

    @classmethod
    def preset(cls, name: str) -> MotionCacheConfig:
        """A named setting for a model with a time modulation: the papers', and our own `best`.

        `exact`: no caching. `slow`: MotionCache as published, τ = 0.1. `fast`: τ = 0.15; the paper does not publish its
        fast threshold, this is FlowCache's. `flowcache-slow`, `flowcache-fast`: the same with α = 1. `teacache-slow`,
        `teacache-fast`: TeaCache with the same thresholds; the papers do not publish the ones they used for it.
        `best`: what docs/research.md found to be nearest to exact at the same compute, at the threshold of `slow`.

        Raises:
            UserError: no preset has that name.
        """
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}; {near_miss(name, PRESETS)}")
        return cls(**PRESETS[name])


BEST: dict[str, Any] = {
    "alpha": 1.0,
    "grading": 0.5,
    "extrapolation": "logsnr",
    "extrapolation_weight": 0.75,
}
"""What `best` changes in a model's published settings."""
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact"},
    "slow": {},
    "fast": {"threshold": 0.15},
    "flowcache-slow": {"alpha": 1.0},
    "flowcache-fast": {"alpha": 1.0, "threshold": 0.15},
    "teacache-slow": {"method": "teacache"},
    "teacache-fast": {"method": "teacache", "threshold": 0.15},
    "best": BEST,
}
