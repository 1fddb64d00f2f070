"""Numbers as people read them."""

import pytest

from graftwork.report import words


@pytest.mark.parametrize(
    ("value", "said", "with_sign"),
    [(0.0, "0.00", "+0.00"), (0.5, "0.50", "+0.50"), (-0.25, "-0.25", "−0.25"), (0.0000234, "2.3e-05", "+2.3e-05"),
     (12.345, "12.3", "+12.3"), (-20_000, "-20,000", "−20,000")],
)  # fmt: skip
def test_a_price_is_not_rounded_to_nothing(value: float, said: str, with_sign: str) -> None:
    assert (words.number(value), words.signed_number(value)) == (said, with_sign)
