"""The procedural videos are what their captions say, and the same on every machine."""

import itertools

import numpy as np
import pytest

from common.errors import UserError
from training import procedural as pv


def words(shape="circle", motion="still", texture="plain", pan="static", colour="red"):
    return pv.SceneWords((pv.SpriteWords(colour, shape, motion),), texture, "grey", pan)


def centre_of_red(frame: np.ndarray) -> tuple[float, float]:
    """Centre of mass `(x, y)` of the pixels where red stands out."""
    mass = np.clip(frame[..., 0] - frame[..., 1] - 0.2, 0, None)
    rows, columns = np.indices(mass.shape)
    return (columns * mass).sum() / mass.sum(), (rows * mass).sum() / mass.sum()


def test_clip_is_deterministic_and_bounded():
    first, caption = pv.clip("train", 7, 9)
    again, caption_again = pv.clip("train", 7, 9)
    assert caption == caption_again
    np.testing.assert_array_equal(first, again)
    assert first.shape == (9, 96, 96, 3) and first.dtype == np.float32
    assert 0 <= first.min() < first.max() <= 1


def test_a_later_start_is_the_same_clip_cut():
    whole, _ = pv.clip("train", 3, 21)
    tail, _ = pv.clip("train", 3, 9, start=12)
    np.testing.assert_allclose(whole[12:], tail, atol=1e-6)


def test_captions_say_what_was_drawn():
    for index in range(400):
        rng = pv.rng_of("train", index)
        drawn = pv.draw_words(rng)
        subject, _, ground = pv.caption_of(drawn, rng).rpartition(" a ")
        for sprite in drawn.sprites:
            assert any(
                f" {sprite.colour} {sprite.shape} {p}" in f" {subject}" for p in pv.MOTION_PHRASES[sprite.motion]
            )
        assert f"{drawn.texture} {drawn.ground} background" in ground
        assert [pan for pan in ("left", "right") if f"panning {pan}" in ground] == [drawn.pan] * (drawn.pan != "static")


def test_captions_use_only_the_vocabulary():
    vocabulary = set(pv.vocabulary())
    assert {word for caption in pv.prompts("train", 300) for word in caption.split()} == vocabulary


def test_prompt_sets_are_disjoint():
    sets = [set(pv.prompts(split, 48)) for split in ("calibration", "choosing", "reporting")]
    assert all(len(s) == 48 for s in sets)
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_movers_go_where_the_caption_says(motion, axis, sign):
    for seed in range(5):
        video = pv.render(pv.place(words(motion=motion), pv.rng_of("train", seed)), 13)
        travelled = centre_of_red(video[-1])[axis] - centre_of_red(video[0])[axis]
        assert 6 < sign * travelled < 20


def test_still_things_are_still_and_spinners_turn_in_place():
    still = pv.render(pv.place(words(), pv.rng_of("train", 0)), 9)
    np.testing.assert_array_equal(still[0], still[-1])
    spinning = pv.render(pv.place(words("cross", "spinning"), pv.rng_of("train", 0)), 9)
    assert np.abs(spinning[0] - spinning[-1]).max() > 0.2
    np.testing.assert_allclose(centre_of_red(spinning[0]), centre_of_red(spinning[-1]), atol=1.5)


@pytest.mark.parametrize("texture", [t for t in pv.TEXTURES if t != "plain"])
def test_panning_shifts_the_background(texture):
    scene = pv.place(words(texture=texture, pan="right"), pv.rng_of("train", 1))
    video = pv.render(scene, 9)
    bottom = video[:, -6:, :, 2]
    assert np.abs(bottom[0] - bottom[-1]).max() > 0.05
    still = pv.render(pv.place(words(texture=texture), pv.rng_of("train", 1)), 9)
    np.testing.assert_array_equal(still[0], still[-1])


def test_no_two_shapes_look_alike():
    inside = []
    for shape in pv.SHAPES:
        video = pv.render(pv.place(words(shape), pv.rng_of("train", 2)), 1)
        inside.append(video[0, ..., 0] - video[0, ..., 1] > 0.3)
    assert all(100 < mask.sum() < 1600 for mask in inside)
    for a, b in itertools.combinations(inside, 2):
        assert (a ^ b).sum() > 0.15 * (a | b).sum()


def test_unknown_split_is_refused():
    with pytest.raises(UserError, match="nowhere"):
        pv.rng_of("nowhere", 0)
