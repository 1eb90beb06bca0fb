"""Captioned procedural video: textured sprites moving over textured backgrounds.

Everything is a pure function of `(split, index)`: the words, the geometry and the pixels. A clip is made in three
stages: `draw_words` (what the caption says) -> `place` (what it leaves open) -> `render` (pixels).
"""

import itertools
from dataclasses import dataclass

import numpy as np

from common.errors import UserError

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.13, 0.13),
    "green": (0.15, 0.70, 0.20),
    "blue": (0.15, 0.30, 0.92),
    "yellow": (0.95, 0.86, 0.12),
    "white": (0.96, 0.96, 0.96),
    "black": (0.06, 0.06, 0.06),
    "orange": (0.97, 0.52, 0.08),
    "purple": (0.58, 0.18, 0.75),
}
GROUNDS: dict[str, tuple[float, float, float]] = {
    "grey": (0.50, 0.50, 0.50),
    "beige": (0.80, 0.72, 0.56),
    "navy": (0.12, 0.16, 0.34),
    "brown": (0.40, 0.27, 0.17),
    "teal": (0.16, 0.48, 0.48),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "striped", "checkered", "dotted", "grassy")
PANS = ("static", "left", "right")
MOTION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("moving left", "sliding to the left"),
    "right": ("moving right", "sliding to the right"),
    "up": ("moving up", "rising"),
    "down": ("moving down", "falling"),
    "bouncing": ("bouncing", "jumping up and down"),
    "spinning": ("spinning", "turning around"),
    "still": ("standing still", "staying in place"),
}
PREFIX = "a video of "
PAN_PHRASES: dict[str, tuple[str, ...]] = {"left": ("panning left",), "right": ("panning right",)}
TWO_SPRITES_SHARE = 0.2
PANNING_SHARE = 0.1
CONTRAST = 0.13
"""Peak deviation of a background's texture from its colour, of 1.0 for full white."""

EDGE = 2.5
"""Width in pixels of a sprite's soft edge: what a small autoencoder can still code well."""

_SPLIT_SEEDS = {"train": 0, "calibration": 1, "choosing": 2, "reporting": 3, "vae": 4, "heldout": 5}


@dataclass(frozen=True)
class SpriteWords:
    """What a caption says of one sprite."""

    colour: str
    shape: str
    motion: str


@dataclass(frozen=True)
class SceneWords:
    """What a caption says of a clip: one or two sprites, and the background."""

    sprites: tuple[SpriteWords, ...]
    texture: str
    ground: str
    pan: str = "static"


@dataclass(frozen=True)
class Sprite:
    """A placed sprite; lengths in pixels, times in frames, angles in radians."""

    words: SpriteWords
    radius: float
    x: float
    y: float
    speed: float
    angle: float
    phase: float


@dataclass(frozen=True)
class Scene:
    """A placed scene of `size` x `size` pixels, ready to render."""

    words: SceneWords
    size: int
    sprites: tuple[Sprite, ...]
    pan_speed: float
    period: float
    vertical: bool
    waves: tuple[tuple[float, float, float], ...]
    """Plane waves of the grassy texture: `(kx, ky, phase)` in radians per pixel."""


def rng_of(split: str, index: int) -> np.random.Generator:
    """Return the random generator of clip `index` of a split; splits never share a clip.

    Raises:
        UserError: for an unknown split.
    """
    if split not in _SPLIT_SEEDS:
        raise UserError(f"split {split!r} is unknown: use one of {', '.join(_SPLIT_SEEDS)}")
    return np.random.default_rng([_SPLIT_SEEDS[split], index])


def draw_words(rng: np.random.Generator) -> SceneWords:
    """Draw the words of a random scene."""

    def pick(options):
        return options[int(rng.integers(len(options)))]

    count = 2 if rng.random() < TWO_SPRITES_SHARE else 1
    shapes = rng.permutation(len(SHAPES))
    colours = rng.permutation(len(COLOURS))
    names = tuple(COLOURS)
    sprites = tuple(
        SpriteWords(names[colours[i]], SHAPES[shapes[i]], pick(tuple(MOTION_PHRASES))) for i in range(count)
    )
    texture = pick(TEXTURES)
    panning = texture != "plain" and rng.random() < PANNING_SHARE
    return SceneWords(sprites, texture, pick(tuple(GROUNDS)), pick(PANS[1:]) if panning else "static")


def caption_of(words: SceneWords, rng: np.random.Generator) -> str:
    """Say a scene in words, in one of the grammar's paraphrases."""

    def pick(options):
        return options[int(rng.integers(len(options)))]

    phrases = []
    for sprite in words.sprites:
        article = "an" if sprite.colour[0] in "aeiou" else "a"
        phrases.append(f"{article} {sprite.colour} {sprite.shape} {pick(MOTION_PHRASES[sprite.motion])}")
    ground = f"{words.texture} {words.ground} background"
    if words.pan != "static":
        ground = f"a {ground} {pick(PAN_PHRASES[words.pan])}"
    else:
        ground = pick((f"a static {ground}", f"a {ground}"))
    prefix = pick(("", "", PREFIX))
    return f"{prefix}{' and '.join(phrases)} {pick(('over', 'on'))} {ground}"


def place(words: SceneWords, rng: np.random.Generator, size: int = 96) -> Scene:
    """Choose everything the words leave open: sizes, places, speeds, phases."""
    pair = len(words.sprites) > 1
    diagonal = int(rng.integers(4))
    sprites = []
    for i, sprite in enumerate(words.sprites):
        radius = rng.uniform(13, 16) if pair else rng.uniform(15, 21)
        if pair:
            # Opposite quarters, so that two sprites rarely start on top of each other.
            quarter = (diagonal + 2 * i) % 4
            x = size * ((0.28, 0.72, 0.72, 0.28)[quarter] + rng.uniform(-0.06, 0.06))
            y = size * ((0.28, 0.28, 0.72, 0.72)[quarter] + rng.uniform(-0.06, 0.06))
        else:
            x, y = size * rng.uniform(0.3, 0.7, 2)
            # A mover starts on the far side, to stay in view for most of a clip.
            if sprite.motion in ("left", "right"):
                x = size * (rng.uniform(0.5, 0.85) if sprite.motion == "left" else rng.uniform(0.15, 0.5))
            elif sprite.motion in ("up", "down"):
                y = size * (rng.uniform(0.5, 0.85) if sprite.motion == "up" else rng.uniform(0.15, 0.5))
        speed = {
            "bouncing": 2 * np.pi / rng.uniform(36, 48),
            "spinning": rng.choice((-1, 1)) * 2 * np.pi / rng.uniform(36, 54),
            "still": 0.0,
        }.get(sprite.motion, rng.uniform(0.7, 1.3))
        angle = rng.uniform(0, 2 * np.pi) if sprite.motion == "spinning" else rng.uniform(-0.2, 0.2)
        sprites.append(Sprite(sprite, radius, x, y, speed, angle, rng.uniform(0, np.pi)))
    period = {"striped": 16.0, "checkered": 24.0, "dotted": 16.0}.get(words.texture, 8.0)
    angles, lengths = rng.uniform(0, np.pi, 6), rng.uniform(10, 20, 6)
    waves = tuple(
        (2 * np.pi / n * np.cos(a), 2 * np.pi / n * np.sin(a), p)
        for a, n, p in zip(angles, lengths, rng.uniform(0, 2 * np.pi, 6), strict=True)
    )
    pan_speed = {"static": 0.0, "left": -1.0, "right": 1.0}[words.pan] * rng.uniform(0.5, 1.0)
    # A horizontal pan would not show on horizontal stripes.
    vertical = words.pan != "static" or bool(rng.random() < 0.5)
    return Scene(words, size, tuple(sprites), pan_speed, period, vertical, waves)


def _texture(scene: Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Value in [-1, 1] of the background's texture at pixels `x`, `y`."""
    if scene.words.texture == "plain":
        return np.zeros(np.broadcast(x, y).shape, np.float32)
    k = np.float32(2 * np.pi / scene.period)
    sharp = np.float32(1.5)
    shift_x, shift_y = scene.waves[0][2], scene.waves[1][2]
    if scene.words.texture == "striped":
        wave = np.tanh(sharp * np.sin(k * (x if scene.vertical else y) + shift_x))
        return np.broadcast_to(wave, np.broadcast(x, y).shape)
    if scene.words.texture == "checkered":
        return np.tanh(sharp * np.sin(k * x + shift_x)) * np.tanh(sharp * np.sin(k * y + shift_y))
    if scene.words.texture == "dotted":
        return np.tanh(1.2 * (np.cos(k * x + shift_x) + np.cos(k * y + shift_y) - 0.8))
    return sum(np.sin(np.float32(kx) * x + np.float32(ky) * y + np.float32(p)) for kx, ky, p in scene.waves) / 3


def _signed_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Signed distance to a shape of radius 1 in its own coordinates (`v` grows downwards), negative inside."""
    if shape == "circle":
        return np.hypot(u, v) - 0.95
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.72) - 0.24
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.82
    if shape == "triangle":
        return np.maximum(v, np.float32(0.8660254) * np.abs(u) - 0.5 * v) - 0.55
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 0.98, b - 0.33), np.maximum(a - 0.33, b - 0.98))
    # Star: fold the plane into one half of one arm; its edge is a line from the tip to the notch.
    sector = np.float32(np.pi / 5)
    angle = np.abs((np.arctan2(u, -v) + sector) % (2 * sector) - sector)
    rho = np.hypot(u, v)
    notch = np.array([np.cos(sector), np.sin(sector)], np.float32) * np.float32(0.46)
    edge = notch - np.array([1.08, 0.0], np.float32)
    nx, ny = np.array([edge[1], -edge[0]], np.float32) / np.float32(np.hypot(*edge))
    return (rho * np.cos(angle) - np.float32(1.08)) * nx + rho * np.sin(angle) * ny


def _path(sprite: Sprite, size: int, time: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre x, centre y (pixels) and angle of a sprite at each time (frames)."""
    motion = sprite.words.motion
    x, y, angle = (np.full(time.shape, value) for value in (sprite.x, sprite.y, sprite.angle))
    if motion == "spinning":
        angle = angle + sprite.speed * time
    elif motion == "bouncing":
        low = np.clip(sprite.y + 0.15 * size, 0, size - sprite.radius)
        y = low - 0.36 * size * np.abs(np.sin(0.5 * sprite.speed * time * 2 + sprite.phase))
    elif motion != "still":
        # Movers leave the picture on one side and come back on the other.
        span, margin = size + 2.4 * sprite.radius, 1.2 * sprite.radius
        step = sprite.speed * time * (-1 if motion in ("left", "up") else 1)
        if motion in ("left", "right"):
            x = (x + step + margin) % span - margin
        else:
            y = (y + step + margin) % span - margin
    return x, y, angle


def render(scene: Scene, frames: int, start: int = 0) -> np.ndarray:
    """Draw a scene: `[frames, size, size, 3]`, float32 in [0, 1], from frame `start` on."""
    size, words = scene.size, scene.words
    time = np.arange(start, start + frames, dtype=np.float32)
    grid = np.arange(size, dtype=np.float32)
    moving = scene.pan_speed != 0
    shift = (scene.pan_speed * time if moving else time[:1] * 0)[:, None, None]
    texture = _texture(scene, grid[None, None, :] - shift, grid[None, :, None])
    ground = np.asarray(GROUNDS[words.ground], np.float32) + np.float32(CONTRAST) * texture[..., None]
    video = np.clip(np.broadcast_to(ground, (frames, size, size, 3)), 0, 1).astype(np.float32)
    for sprite in scene.sprites:
        x, y, angle = _path(sprite, size, time)
        reach = int(np.ceil(1.5 * sprite.radius + EDGE)) + 1
        left, top = np.floor(x).astype(int) - reach, np.floor(y).astype(int) - reach
        box = np.arange(2 * reach + 1, dtype=np.float32)
        dx = (box[None, :] + (left - x)[:, None]).astype(np.float32)[:, None, :] / np.float32(sprite.radius)
        dy = (box[None, :] + (top - y)[:, None]).astype(np.float32)[:, :, None] / np.float32(sprite.radius)
        cos, sin = (f(angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
        u, v = cos * dx + sin * dy, cos * dy - sin * dx
        distance = np.float32(sprite.radius) * _signed_distance(sprite.words.shape, u, v)
        alpha = np.clip(0.5 - distance / np.float32(EDGE), 0, 1)
        # A brighter and a darker side, so that even a circle shows that it spins.
        shade = np.float32(0.85) + np.float32(0.15) * np.tanh(3 * (u + 0.4 * v))
        colour = np.asarray(COLOURS[sprite.words.colour], np.float32)
        paint = shade[..., None] * (0.92 * colour + 0.08)
        for t in range(frames):
            rows = slice(max(0, -top[t]), min(2 * reach + 1, size - top[t]))
            columns = slice(max(0, -left[t]), min(2 * reach + 1, size - left[t]))
            if rows.start >= rows.stop or columns.start >= columns.stop:
                continue
            target = video[
                t, top[t] + rows.start : top[t] + rows.stop, left[t] + columns.start : left[t] + columns.stop
            ]
            target += alpha[t, rows, columns, None] * (paint[t, rows, columns] - target)
    return video


def clip(split: str, index: int, frames: int, size: int = 96, start: int = 0) -> tuple[np.ndarray, str]:
    """Return clip `index` of a split and its caption: `[frames, size, size, 3]` float32 in [0, 1]."""
    rng = rng_of(split, index)
    words = draw_words(rng)
    caption = caption_of(words, rng)
    return render(place(words, rng, size), frames, start), caption


def prompts(split: str, count: int = 32) -> list[str]:
    """Return `count` captions of a split, none of them twice, in a fixed order."""
    seen: dict[str, None] = {}
    for index in itertools.count():
        if len(seen) == count:
            return list(seen)
        rng = rng_of(split, index)
        seen.setdefault(caption_of(draw_words(rng), rng))
    raise AssertionError("unreachable")


def vocabulary() -> list[str]:
    """Return every word of the grammar, sorted."""
    variants = itertools.chain(*MOTION_PHRASES.values(), *PAN_PHRASES.values())
    phrases = [PREFIX, "a an and over on static background", *variants]
    words = {word for phrase in phrases for word in phrase.split()}
    return sorted(words | {*COLOURS, *GROUNDS, *SHAPES, *TEXTURES})
