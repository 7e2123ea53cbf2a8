"""YAML text to plain data, strictly; and, when there is something to say about it, the line of each key.

Words stay words: ``on``, ``off``, ``yes`` and ``22:22`` are text here, not the booleans and base-60 numbers of YAML 1.1.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from l4mesh.errors import ConfigError, Problem

MAX_BYTES = 64 << 20
MAX_NODES = 4_000_000
MAX_DEPTH = 64
_ALIAS = re.compile(r"(?:^|[\s\[,:{-])\*\S", re.MULTILINE)
_DEEP = re.compile(rf"(?:[\[{{]\s*){{{MAX_DEPTH}}}|(?:-\s+){{{MAX_DEPTH}}}")

KeyPath = tuple[str | int, ...]


class _Loader(yaml.CSafeLoader):
    """Refuses duplicate keys, and keys that are not text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep)
        mapping: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key_node.value in mapping:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} stands twice here", key_node.start_mark
                )
            mapping[key_node.value] = self.construct_object(value_node, deep=deep)
        return mapping


for _tag, _pattern, _first in (
    ("bool", r"true|false", "tf"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?", "-+0123456789"),
    ("null", r"~|null|", ["~", "n", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def parse_yaml(text: str, file: str) -> dict[str, Any]:
    """The one document of a file: a mapping, {} when there is nothing in it but comments. Raises ConfigError."""
    if _DEEP.search(text):
        raise ConfigError([Problem(file, 0, "", f"is nested more than {MAX_DEPTH} levels deep")])
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}
        _check_size(node, file, aliases=bool(_ALIAS.search(text)))
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError([Problem(file, mark.line + 1 if mark else 0, "", f"{_reword(error)}")]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError([Problem(file, 0, "", f"is not YAML: {str(error).splitlines()[0]}")]) from None
    except (LookupError, AttributeError):
        # PyYAML takes a value that is tagged by hand for what its tag says: `!!bool abc` and `!!int` end in these.
        raise ConfigError([Problem(file, 0, "", "is not YAML: a value is not what its tag (!!…) says: leave the tag out")]) from None
    finally:
        loader.dispose()
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError([Problem(file, 1, "", "must be a mapping with keys such as listeners and clusters")])
    return data


def _reword(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "can't be read"
    if "found another document" in problem or "but found another document" in str(error):
        return "must be one document: remove the ---"
    if isinstance(error, yaml.constructor.ConstructorError) and "could not determine a constructor" not in problem:
        return problem
    return f"is not YAML: {problem}"


def _check_size(node: yaml.Node, file: str, *, aliases: bool) -> None:
    """Aliases can make a small file stand for a huge tree: count what it would become before building on it."""
    if not aliases:
        return
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > MAX_DEPTH:
            raise ConfigError([Problem(file, 0, "", f"is nested more than {MAX_DEPTH} levels deep")])
        known = sizes.get(id(node))
        if known is None:
            children: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                children = node.value
            elif isinstance(node, yaml.MappingNode):
                children = [part for pair in node.value for part in pair]
            known = sizes[id(node)] = 1 + sum(size(child, depth + 1) for child in children)
        return known

    if size(node, 0) > MAX_NODES:
        raise ConfigError([Problem(file, 0, "", f"stands for more than {MAX_NODES} values: too many aliases")])


def find_lines(text: str, paths: list[KeyPath]) -> list[int]:
    """The line of each key, counted from 1; of a key that is not there, the line of what should hold it."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
    finally:
        loader.dispose()
    return [_find_line(root, path) for path in paths]


def _find_line(node: yaml.Node | None, path: KeyPath) -> int:
    line = node.start_mark.line + 1 if node else 1
    for step in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == step), None)
            if found is None:
                return line
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            return line
    return line
