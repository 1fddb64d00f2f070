"""Searches: each chooses the next point of a sweep from the trials there are."""

from graftwork.tuning.search.drawn import FixedPoints, grid_search, random_search
from graftwork.tuning.search.modelled import optuna_search
from graftwork.tuning.search.pbt import PbtSearch, pbt_search
from graftwork.tuning.search.protocol import Search, Suggestion, Wait
from graftwork.tuning.search_spec import GridSpec, PbtSpec, RandomSpec, TpeSpec
from graftwork.tuning.space import grid_size
from graftwork.tuning.spec import TuneSpec

__all__ = ["FixedPoints", "PbtSearch", "Search", "Suggestion", "Wait", "search_of"]

MODELLED_FROM = 8
"""Trials from which a search that is not named is TPE: better than random after so many (benchmarks/search.py)."""


def search_of(spec: TuneSpec) -> Search:
    """The search that a spec asks for. Raises ConfigError when it can't search this space."""
    if isinstance(spec.search, PbtSpec):
        return pbt_search(spec, spec.search)
    size = grid_size(spec.space)
    if isinstance(spec.search, GridSpec) or (spec.search is None and size is not None and size <= spec.num_trials):
        return grid_search(spec)
    asked = spec.search or (TpeSpec() if spec.num_trials >= MODELLED_FROM else RandomSpec())
    return random_search(spec) if isinstance(asked, RandomSpec) else optuna_search(spec, asked)
