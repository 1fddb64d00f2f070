"""The possible answers of a row that are weighed rather than written."""

from dataclasses import dataclass

from graftwork.data import DatasetRow
from graftwork.errors import DataError


@dataclass(frozen=True)
class Choices:
    """A row's possible answers. `signs`: 1 as a stereotype has it, -1 against it, 0 neither."""

    texts: tuple[str, ...]
    right: int
    signs: tuple[int, ...]

    @classmethod
    def from_row(cls, row: DatasetRow) -> "Choices":
        """From the row's `gold`. Raises DataError."""
        gold = row.gold or {}
        texts, right, signs = gold.get("choices"), gold.get("right"), gold.get("signs", [])
        if not isinstance(texts, list) or not texts or not all(isinstance(one, str) and one for one in texts):
            raise DataError(f"row {row.id}: gold.choices", f"found {texts!r}"[:80],
                            "a row to be weighed lists its possible answers as texts")  # fmt: skip
        if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(texts):
            raise DataError(f"row {row.id}: gold.right", f"found {right!r}", "the place of the right choice, from 0")
        if not isinstance(signs, list) or (signs and len(signs) != len(texts)):
            raise DataError(f"row {row.id}: gold.signs", f"found {signs!r}"[:80], "one sign for each choice")
        return cls(tuple(texts), right, tuple(signs) or (0,) * len(texts))
