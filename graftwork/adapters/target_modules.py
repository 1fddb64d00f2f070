"""Names of a LoRA's targets as PEFT takes them, ends of module names or one regular expression, matched with a base."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from graftwork.errors import ConfigError

if TYPE_CHECKING:
    from graftwork.base.model_shape import Linear

TargetModules = tuple[str, ...] | str
"""Ends of module names at a dot, or a regular expression that a whole name matches."""
_STAR = re.compile(r"\.\*(?=\.|$)")


def check_target_modules(targets: TargetModules) -> None:
    """Raise ValueError for an empty or repeated name, and for a text that is no regular expression."""
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"target_modules={targets!r} is no regular expression: {error}") from None
        return
    if not targets or "" in targets or len(set(targets)) < len(targets):
        raise ValueError(f"target_modules={list(targets)}: names are given, and each of them once")


def matches(targets: TargetModules, name: str) -> bool:
    """Return whether PEFT adapts the module of this full name."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in targets)


def choose(targets: TargetModules, adaptable: Sequence[str], model_name: str, others: Iterable[str] = ()) -> list[str]:
    """Return the names that are targets, in the model's order.

    others: names of modules that get no adapter. Raises ConfigError for a target that is one of them or no module, with
    the nearest names.
    """
    ends = sorted({name.rpartition(".")[2] for name in adaptable})
    rule = f"linear layers of {model_name} that can be adapted: {', '.join(ends)}"
    for one in (targets,) if isinstance(targets, str) else targets:
        alone: TargetModules = one if isinstance(targets, str) else (one,)
        if any(matches(alone, name) for name in adaptable):
            continue
        if any(matches(alone, name) for name in others):
            found, hint = "it gets no adapter", "name other layers: head, embeddings and routers are left out"
        else:
            near = difflib.get_close_matches(one.rpartition(".")[2], ends, n=2, cutoff=0.4)
            found = "no linear layer has such a name"
            hint = f"did you mean {' or '.join(near)}?" if near else f"name {ends[0]}, for example"
        raise ConfigError(f"adapter.target_modules={one}", found, rule, hint)
    return [name for name in adaptable if matches(targets, name)]


def choose_linears(targets: TargetModules, linears: Sequence["Linear"], model_name: str) -> tuple["Linear", ...]:
    """Return the linears of a base's shape that are targets; of one pattern of names those that match.

    Raises ConfigError as `choose` does.
    """
    names = {linear.name: _names(linear) for linear in linears}
    chosen = set(choose(targets, [name for found in names.values() for name in found], model_name))
    found = []
    for linear in linears:
        count = sum(name in chosen for name in names[linear.name])
        if count:
            found.append(replace(linear, count=count))
    return tuple(found)


def _names(linear: "Linear") -> list[str]:
    """Full names of the layers that a pattern stands for."""
    return [_STAR.sub(f".{number}", linear.name, count=1) for number in linear.blocks or range(linear.count)]


def saved_modules(asked: Sequence[str], model: Any) -> tuple[list[str], bool]:
    """Return PEFT's `modules_to_save`, and True where the base ties them, so that one copy serves as both.

    asked: `embed_tokens`, `lm_head`; the base has names of its own for them. Raises ConfigError where it has none.
    """
    if not asked:
        return [], False
    layers = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    missing = [name for name in asked if layers[name] is None]
    if missing:
        raise ConfigError(
            f"adapter.modules_to_save={missing[0]}",
            f"{type(model).__name__} has none",
            "embedding and output head are trained whole",
            "leave it out",
        )
    tied = layers["lm_head"] is not None and layers["lm_head"].weight is layers["embed_tokens"].weight
    chosen = ["embed_tokens"] if tied else asked
    return [names[id(layers[name])] for name in chosen], tied
