"""Changes values in a YAML file's text and leaves everything else as it stands: comments, order and spacing."""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from common.errors import UserError
from common.files import parse_yaml

Path = tuple[str, ...]
WIDTH = 116
SHORT = 76  # lists up to this length stay on one line


@dataclass(frozen=True)
class Shared:
    """A value that stands at several places: written once with an anchor, then as an alias of it."""

    name: str
    value: Any


def set_values(text: str, values: Mapping[Path, Any], comments: Mapping[Path, str] | None = None) -> str:
    """A YAML text with some values replaced or added.

    Args:
        text: the file; a mapping of mappings, in block or flow style.
        values: by the keys that lead to them: `{("cache", "threshold"): 0.1}`. Numbers, text, booleans, null, flat
            lists of them, or `Shared`. A key that is missing is added at the end of its mapping.
        comments: replace what stands behind a value on its line; only for single values in block style.

    Returns:
        The new text, which reads back as the old one with these values.

    Raises:
        UserError: a value cannot be changed alone, because an alias or a merge key shares it.
    """
    wanted = copy.deepcopy(parse_yaml(text))
    for path, value in values.items():
        node = wanted
        for key in path[:-1]:
            node[key] = dict(node.get(key) or {})  # what an alias shares is not shared in the result
            node = node[key]
        node[path[-1]] = value.value if isinstance(value, Shared) else value
    try:
        for path, value in values.items():
            text = _set(text, path, value, (comments or {}).get(path))
        changed = parse_yaml(text)
    except yaml.YAMLError:
        changed = None
    if changed != wanted:
        names = ", ".join(dict.fromkeys(".".join(path[:2]) for path in values))
        raise UserError(
            f"cannot change {names} in place: an anchor, alias or merge key shares a value; write it out in the file"
        )
    return text


def _set(text: str, path: Path, value: Any, comment: str | None) -> str:
    if comment is None and _read(text, path) == (value.value if isinstance(value, Shared) else value):
        return text  # it may be an alias of a value that was changed already
    node = yaml.compose(text)
    for depth, key in enumerate(path):
        found = _child(node, key)
        if found is None and depth + 1 < len(path):
            return _set(_insert(text, node, key, "{}", None), path, value, comment)
        if found is None:
            return _insert(text, node, key, _written(value, text, "", node.start_mark.index), comment)
        label, node = found
    start = text.index(":", label.end_mark.index) + 1
    old = text[start:].lstrip()
    alias = re.match(r"\*[^\s,\[\]{}]+", old)  # its node stands elsewhere
    end = start + text[start:].index("*") + alias.end() if alias else _end(node)
    if comment is not None:
        end = _line_end(text, end)
    return f"{text[:start]} {_written(value, text, old, label.start_mark.index)}{_comment(comment)}{text[end:]}"


def _insert(text: str, node: yaml.MappingNode, key: str, written: str, comment: str | None) -> str:
    if node.flow_style:
        head = text[: _end(node) - 1].rstrip()
        separator = "" if head.endswith("{") else " " if head.endswith(",") else ", "
        return f"{head}{separator}{key}: {written}{text[_end(node) - 1 :]}"
    end = _line_end(text, _end(node))
    return f"{text[:end]}\n{' ' * node.start_mark.column}{key}: {written}{_comment(comment)}{text[end:]}"


def _written(value: Any, text: str, old: str, index: int) -> str:
    """What to write for a value in place of `old`, on the line of the text's character `index`."""
    line = text[text.rfind("\n", 0, index) + 1 :]
    indent = len(line) - len(line.lstrip(" "))
    anchor = re.match(r"&(\S+) ", old)
    if not isinstance(value, Shared):
        return (anchor.group() if anchor else "") + _plain(value, indent)
    if re.search(rf"&{value.name}\b", text) and (anchor is None or anchor.group(1) != value.name):
        return f"*{value.name}"
    return f"&{value.name} {_plain(value.value, indent)}"


def _read(text: str, path: Path) -> Any:
    value = parse_yaml(text)
    for key in path:
        value = (value or {}).get(key)
    return value


def _line_end(text: str, index: int) -> int:
    end = text.find("\n", index)
    return len(text) if end < 0 else end


def _child(node: yaml.Node, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"cannot set {key!r}: there is a single value where a mapping is expected; give {{key: value}}")
    return next(((label, child) for label, child in node.value if label.value == key), None)


def _end(node: yaml.Node) -> int:
    """Where a node's text ends. PyYAML's mark of a block collection lies behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return node.end_mark.index


def _plain(value: Any, indent: int) -> str:
    """A value in flow style; long lists are broken into lines that are indented more than the first one."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()
    if len(text) <= SHORT or not isinstance(value, list):
        return text
    pad = " " * (indent + 2)
    lines = textwrap.fill(text[1:-1], WIDTH, initial_indent=pad, subsequent_indent=pad)
    return f"[\n{lines}\n{' ' * indent}]"


def _comment(comment: str | None) -> str:
    return f"  # {comment}" if comment else ""
