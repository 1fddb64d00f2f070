"""`for_each`: a list entry that says `{k}` stands once for every value of k."""

from collections.abc import Mapping, Sequence
from typing import Any


def expand(tree: Any, values: Mapping[str, Sequence[Any]]) -> Any:
    """The tree with every list entry that names a swept key repeated, the innermost list first.

    A string that is nothing but `{k}` becomes the value itself, a number where it is one; elsewhere its text is put in.
    """
    if isinstance(tree, Mapping):
        return {key: expand(value, values) for key, value in tree.items()}
    if not isinstance(tree, list):
        return tree
    entries: list[Any] = []
    for entry in tree:
        entries += _repeated(expand(entry, values), values)
    return entries


def _repeated(entry: Any, values: Mapping[str, Sequence[Any]]) -> list[Any]:
    entries = [entry]
    for key, swept in values.items():
        if _names(entry, f"{{{key}}}"):
            entries = [_put(one, f"{{{key}}}", value) for one in entries for value in swept]
    return entries


def _names(tree: Any, mark: str) -> bool:
    if isinstance(tree, Mapping):
        return any(_names(value, mark) for value in tree.values())
    if isinstance(tree, list):
        return any(_names(value, mark) for value in tree)
    return isinstance(tree, str) and mark in tree


def _put(tree: Any, mark: str, value: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _put(one, mark, value) for key, one in tree.items()}
    if isinstance(tree, list):
        return [_put(one, mark, value) for one in tree]
    if isinstance(tree, str):
        return value if tree == mark else tree.replace(mark, str(value))
    return tree
