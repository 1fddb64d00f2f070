"""Where outcomes lie: `before` by content in the root, both together in the run's outcomes.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftwork.storage import RunPaths, Store
from graftwork.training.outcomes.parts import ItemGroup, ItemOutput

FILE = "outcomes.json"


@dataclass(frozen=True)
class PartOutcome:
    """What was said to a part's items, in their order."""

    digest: str
    before: tuple[ItemOutput, ...]
    after: tuple[ItemOutput, ...]


def knows_before(store: Store, key: str) -> bool:
    """Whether some run has asked the bare base."""
    return store.exists(*_before(key))


def read_before(store: Store, key: str) -> list[ItemOutput]:
    """What the bare base said."""
    return [ItemOutput.from_dict(one) for one in store.read_json(*_before(key))]


def write_before(store: Store, key: str, said: Sequence[ItemOutput]) -> None:
    """Keep what the bare base said, for all runs."""
    store.write_json([one.as_dict() for one in said], *_before(key))


def read_parts(run: RunPaths) -> dict[str, PartOutcome]:
    """The parts of a run that were measured."""
    if not run.store.exists(*run.file(FILE)):
        return {}
    return {name: _part(found) for name, found in run.store.read_json(*run.file(FILE)).items()}


def write_part(run: RunPaths, part: ItemGroup, before: Sequence[ItemOutput], after: Sequence[ItemOutput]) -> None:
    """Add a part to the run's record. Rank 0."""
    known = run.store.read_json(*run.file(FILE)) if run.store.exists(*run.file(FILE)) else {}
    both = {"before": [one.as_dict() for one in before], "after": [one.as_dict() for one in after]}
    items = [item.id for item in part.items]
    run.store.write_json({**known, part.name: {"digest": part.digest(), "items": items, **both}}, *run.file(FILE))


def missing(run: RunPaths, parts: Sequence[ItemGroup]) -> tuple[ItemGroup, ...]:
    """The parts that are still to be measured, or were with other questions."""
    known = read_parts(run)
    return tuple(part for part in parts if part.name not in known or known[part.name].digest != part.digest())


def _part(found: Mapping[str, Any]) -> PartOutcome:
    before, after = (tuple(ItemOutput.from_dict(one) for one in found[key]) for key in ("before", "after"))
    return PartOutcome(found["digest"], before, after)


def _before(key: str) -> tuple[str, str]:
    return "outcomes", f"{key}.json"
