"""One quantile rule, numbers with units, signatures that say how to recompute."""

import numpy as np
import pytest

from graftwork import __version__, metrics


@pytest.mark.parametrize("n", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.95, 0.99, 1.0])
def test_quantile_is_numpy_linear(n: int, q: float) -> None:
    values = np.random.default_rng(n).lognormal(size=n)
    assert metrics.quantile(list(values), q) == pytest.approx(np.quantile(values, q, method="linear"), rel=1e-12)


def test_quantile_of_nothing_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="at least one value"):
        metrics.quantile([], 0.5)


def test_distribution_carries_unit_and_n() -> None:
    found = metrics.distribution([3.0, 1.0, 2.0], "ms")
    assert found is not None
    assert (found.unit, found.n, found.mean, found.p50, found.max) == ("ms", 3, 2.0, 2.0, 3.0)
    assert (found.p95, found.p99) == pytest.approx((2.9, 2.98))
    assert metrics.distribution([], "ms") is None


def test_signature_names_the_recipe() -> None:
    signed = metrics.signature("both", 200, {"arm": "raft+rag", "base": "1f0c9a2b", "quant": "nf4", "seed": 0})
    assert signed == f"both|n:200|arm:raft+rag|base:1f0c9a2b|quant:nf4|seed:0|v:{__version__}"


def test_signature_cannot_be_forged_by_a_name() -> None:
    assert metrics.signature("both", 2, {"arm": "a|n:9000"}).split("|")[:3] == ["both", "n:2", "arm:a/n:9000"]


def test_scores_have_unit_direction_and_meaning() -> None:
    assert [m.name for m in metrics.SCORES] == ["facts", "form", "both", "field_accuracy"]
    assert all(m.unit and m.meaning and m.better == "higher" for m in metrics.SCORES)
