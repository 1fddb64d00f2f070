"""Intervals and tests of comparisons, on numpy and scipy.special alone; each is pinned in tests to another source."""

from graftwork.stats.clusters import cluster_bootstrap, cluster_sign_flip
from graftwork.stats.families import benjamini_hochberg, holm, tied_sets
from graftwork.stats.paired import (
    POWER,
    RESAMPLES,
    Floats,
    Interval,
    Verdict,
    bca_mean,
    decide,
    equivalent,
    mcnemar_exact,
    mcnemar_midp,
    mde_binary,
    mde_graded,
    n_for_binary,
    n_for_equivalence,
    n_for_graded,
    newcombe_paired,
    sign_flip,
    wilson,
)
from graftwork.stats.preference import Preference, Strength, bradley_terry

__all__ = [
    "POWER",
    "RESAMPLES",
    "Floats",
    "Interval",
    "Preference",
    "Strength",
    "Verdict",
    "bca_mean",
    "benjamini_hochberg",
    "bradley_terry",
    "cluster_bootstrap",
    "cluster_sign_flip",
    "decide",
    "equivalent",
    "holm",
    "mcnemar_exact",
    "mcnemar_midp",
    "mde_binary",
    "mde_graded",
    "n_for_binary",
    "n_for_equivalence",
    "n_for_graded",
    "newcombe_paired",
    "sign_flip",
    "tied_sets",
    "wilson",
]
