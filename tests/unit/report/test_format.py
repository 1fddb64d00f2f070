"""Numbers as people read them."""

import pytest

from graftwork.report import format as words


@pytest.mark.parametrize(
    ("value", "said", "with_sign"),
    [
        (0.0, "0.00", "+0.00"),
        (0.5, "0.50", "+0.50"),
        (-0.25, "-0.25", "−0.25"),
        (0.0000234, "2.3e-05", "+2.3e-05"),
        (12.345, "12.3", "+12.3"),
        (-20_000, "-20,000", "−20,000"),
    ],
)
def test_a_price_is_not_rounded_to_nothing(value: float, said: str, with_sign: str) -> None:
    assert (words.number(value), words.signed_number(value)) == (said, with_sign)


def test_a_share_has_the_same_digits_everywhere() -> None:
    """139 of 200 was 0.69 in the table and 70% in the headline."""
    assert (words.score(139 / 200), words.number(139 / 200), words.percent(139 / 200)) == ("0.70", "0.70", "70%")
    for n in range(1, 301):
        for k in range(n + 1):
            share = k / n
            digits = words.score(share)
            assert words.number(share) == digits or 0 < share < 0.001
            assert words.percent(share) == f"{float(digits) * 100:.0f}%"
            assert words.percents(share, share) == f"[{words.points(share)}, {words.points(share)}]"
            assert words.interval(share, share) == f"[{digits}, {digits}]"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (words.numbers(1.7e-18, 0.02), "[0.00, 0.02]"),
        (words.number(-1e-17), "0.00"),
        (words.signed_number(-1e-17), "+0.00"),
        (words.number(2e-5), "2e-05"),
        (words.signed(-0.001), "+0.00"),
        (words.percent(-0.004), "0%"),
        (words.rounded(float("nan")), "nan"),
        (words.rounded(0.9185, 3), "0.918"),
        (words.milliseconds(107_691.0), "108 s"),
        (words.milliseconds(9_999.0), "9,999 ms"),
    ],
)
def test_no_dust_and_no_five_digits_of_milliseconds(said: str, expected: str) -> None:
    assert said == expected
