"""One reward of a run: its function, its weight, and what happens where the function fails."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graftwork.data import DatasetRow
from graftwork.errors import GraftworkError, RunError

Score = Callable[[str, DatasetRow], float]


class BadReward(RunError):
    """A reward failed or is no number. Raised on all ranks at the same step."""


@dataclass(frozen=True)
class Reward:
    """A reward that any process can compute from the answer's text. Picklable."""

    label: str
    weight: float
    clip: tuple[float, float] | None
    score: Score
    content: str = ""
    """What decides it beside the spec's own words: the text of its schema."""

    def compute(self, answer: str, row: DatasetRow) -> float:
        """The clipped reward. Raises BadReward naming the row."""
        try:
            value = float(self.score(answer, row))
        except GraftworkError:
            raise
        except Exception as error:  # a function of another package: whatever it raises ends the run with the row named
            raise _bad(self, row, f"it raised {type(error).__name__}: {error}", answer) from error
        return checked(self, row, value, answer)


@dataclass(frozen=True)
class ModelReward:
    """A reward that a published reward model gives to the whole conversation. Picklable: a worker loads the model."""

    label: str
    weight: float
    clip: tuple[float, float] | None
    content: str
    """`task@version`."""


AnyReward = Reward | ModelReward


def checked(reward: AnyReward, row: DatasetRow, value: float, answer: str) -> float:
    """The value, clipped. Raises BadReward where it is no number."""
    if not math.isfinite(value):
        raise _bad(reward, row, f"it returned {value}", answer)
    return value if reward.clip is None else min(max(value, reward.clip[0]), reward.clip[1])


def total(rewards: Sequence[AnyReward], values: Sequence[float]) -> float:
    """The weighed sum of an answer's rewards."""
    return math.fsum(reward.weight * value for reward, value in zip(rewards, values, strict=True))


def _bad(reward: AnyReward, row: DatasetRow, found: str, answer: str) -> BadReward:
    return BadReward(
        f"reward {reward.label!r} of row {row.id!r}",
        f"{found}; the answer was {answer[:200]!r}",
        "a reward is a finite number for every answer",
        "mend it, and run the same command: it continues from the last checkpoint",
    )
