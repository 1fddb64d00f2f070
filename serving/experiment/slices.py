"""Parts of the questions that share a field's value. They explore: p-values by Benjamini-Hochberg, never a claim."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from graftwork.report.records import Score, Slice
from graftwork.serving.experiment.verdict import Rules, ScoredArms, UnadjustedDifference, arm_score, judge

OTHER = "(other)"


def slices(
    scored: ScoredArms, fields: Mapping[str, Sequence[str]], metric: str, baseline: str, rules: Rules, fewest: int
) -> tuple[Slice, ...]:
    """Every arm against the baseline in every slice. `fields`: the value of each question, by field.

    Values with fewer than `fewest` questions are taken together; where those are too few as well, they are left out.
    """
    parts = [(field, value, part) for field, values in fields.items() for value, part in _parts(scored, values, fewest)]
    others = [name for name in scored.names if name != baseline]
    pairs = [
        [UnadjustedDifference.compute(part, (name, baseline, metric), rules) for name in others] for _, _, part in parts
    ]
    judged = iter(judge([seen for some in pairs for seen in some if seen], rules, "bh"))
    return tuple(
        Slice(
            field=field, value=value, n=part.n, scores=_scores(part, metric, rules),
            differences=tuple(next(judged) for seen in some if seen),
        )
        for (field, value, part), some in zip(parts, pairs, strict=True)
    )  # fmt: skip


def _parts(scored: ScoredArms, values: Sequence[str], fewest: int) -> list[tuple[str, ScoredArms]]:
    counts = Counter(sorted(values))
    named = [value if counts[value] >= fewest else OTHER for value in values]
    kept = [value for value in counts if counts[value] >= fewest]
    kept += [OTHER] if named.count(OTHER) >= fewest else []
    return [(value, scored.only(np.array([name == value for name in named]))) for value in kept]


def _scores(part: ScoredArms, metric: str, rules: Rules) -> dict[str, Score]:
    found = {arm: arm_score(arm, part.by_name[metric], part, rules) for arm in part.names}
    return {arm: score for arm, score in found.items() if score}
