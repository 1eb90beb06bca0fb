"""A preset means the same in Python and in the shipped files."""

import pytest

from common.cache import MotionCacheConfig
from common.cache.config import PRESETS
from common.errors import UserError
from common.settings import CONFIGS
from magi1_motioncache import settings as magi
from magi1_motioncache.cache_presets import PRESETS as MAGI_PRESETS
from magi1_motioncache.cache_presets import cache_preset
from skyreels_v2_motioncache import settings as skyreels
from skyreels_v2_motioncache.polynomial import POLYNOMIALS


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "exact"])
def test_skyreels(name):
    run, _ = skyreels.load_settings(CONFIGS / "skyreels_v2_1.3b_540p_slow.yaml", preset=name)
    assert run.cache == MotionCacheConfig.preset(name).replace(polynomial=POLYNOMIALS[1536, 30])


@pytest.mark.parametrize("name", [name for name in MAGI_PRESETS if name != "exact"])
def test_magi(name):
    run, _ = magi.load_settings(CONFIGS / "magi1_4.5b_distill_slow.yaml", preset=name)
    assert run.cache == cache_preset(name)


def test_both_models_have_the_same_presets():
    assert PRESETS.keys() == MAGI_PRESETS.keys()
    assert MotionCacheConfig.preset("exact").method == cache_preset("exact").method == "exact"


@pytest.mark.parametrize("preset", [MotionCacheConfig.preset, cache_preset])
def test_an_unknown_name_is_answered_with_a_near_one(preset):
    with pytest.raises(UserError, match="did you mean 'teacache-slow'"):
        preset("teacache-slo")


def test_tags_tell_methods_apart():
    tags = {name: MotionCacheConfig.preset(name).tag for name in PRESETS}
    assert tags["teacache-slow"] == "teacache-t0.1-w5-modulation"
    assert len(set(tags.values())) == len(PRESETS)
    assert MotionCacheConfig(kv_budget=3).tag.endswith("kv3token")
