"""Values in a YAML file change; its comments, order and spacing do not."""

import pytest
import yaml

from benchmarks.yaml_text import Shared, set_values
from common.errors import UserError


def test_yaml_keeps_what_is_not_changed():
    text = "# head\na: 1  # one\nb:\n  c: [  # long\n    1, 2,\n  ]\n  d: 2  # two\n# tail\ne: {f: 3}\n"
    changed = set_values(text, {("a",): 5, ("b", "c"): [0.5], ("b", "d"): 7, ("e", "g"): True}, {("b", "d"): "seven"})
    assert changed == "# head\na: 5  # one\nb:\n  c: [0.5]\n  d: 7  # seven\n# tail\ne: {f: 3, g: true}\n"


def test_yaml_adds_what_is_missing():
    assert set_values("a:\n  b: 1\n# end\n", {("a", "c"): 2}) == "a:\n  b: 1\n  c: 2\n# end\n"
    assert set_values("m: {}", {("m", "c", "t"): 0.1}) == "m: {c: {t: 0.1}}"
    assert yaml.safe_load(set_values("a: 1", {("s", "x"): [1.5] * 40})) == {"a": 1, "s": {"x": [1.5] * 40}}


def test_yaml_writes_a_shared_value_once():
    text = "a: {v: 1}\nb: {v: [2]}\nc: {w: 0}\n"
    shared = Shared("t", [0.25] * 30)
    paths = [(key, "v") for key in "abc"]
    once = set_values(text, dict.fromkeys(paths, shared))
    assert once.count("&t") == 1 and once.count("*t") == 2
    twice = set_values(once, dict.fromkeys(paths, Shared("t", [1.0, 2.0])))
    assert twice == "a: {v: &t [1.0, 2.0]}\nb: {v: *t}\nc: {w: 0, v: *t}\n"


def test_yaml_refuses_to_change_what_others_share():
    with pytest.raises(UserError, match="cannot change b.x in place"):
        set_values("a: &a {x: 1}\nb: *a\n", {("b", "x"): 2})
