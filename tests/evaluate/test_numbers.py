"""Numbers as they are written, read by hand."""

import pytest

from phi3v_dist.evaluate.numbers import read_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("120", 120.0), ("0", 0.0), ("007", 7.0), (" 12 ", 12.0), ("12.", 12.0), (".5", 0.5), ("0.125", 0.125),
        ("1,299", 1299.0), ("1,299.50", 1299.5), ("1.234,50", 1234.5), ("1.234.567,8", 1234567.8), ("1,5", 1.5),
        ("12,345,678", 12_345_678.0), ("1.234.567", 1_234_567.0), ("12,34,567", 1_234_567.0), ("1.234", 1.234),
        ("1299.500", 1299.5), ("1 299", 1299.0), ("1 299,90", 1299.9), ("1 299", 1299.0), ("1'299.50", 1299.5),
        ("$1,299", 1299.0), ("€ 12,50", 12.5), ("12,50 €", 12.5), ("USD 1,299", 1299.0), ("1299 USD", 1299.0),
        ("£0.99", 0.99), ("¥12,000", 12000.0), ("₹ 12,34,567.00", 1_234_567.0), ("-3.5", -3.5), ("−3.5", -3.5),
        ("+4", 4.0), ("-$5", -5.0), ("$-5", -5.0), ("15 %", 15.0), ("1e3", 1000.0), ("2.5E-1", 0.25),
        ("١٢٣", 123.0), ("١٬٢٣٤٫٥", 1234.5), ("१२३", 123.0), ("12", 12.0), ("1299.50.", 1299.5), ("12!", 12.0),
    ],
)  # fmt: skip
def test_a_number_is_read_however_it_is_written(text, number):
    assert read_number(text) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ".", ",", "-", "$", "USD", "unknown", "nan", "inf", "-inf", "12.3.4", "1,23,4", "1,2,3", "1..2",
        "1,,2", "12 34", "120 or 130", "12-13", "1.234,56,7", "1,234.567,8", "9" * 400, "0x10", "1_000", "12 red", "²",
        "½", "1e", "--5", "12a", "a12", "十二", "1 299 1",
    ],
)  # fmt: skip
def test_what_is_no_single_number_is_none(text):
    assert read_number(text) is None


def test_one_separator_before_three_digits_is_what_the_field_says():
    assert (read_number("1.234", ","), read_number("1,234", ",")) == (1234.0, 1.234)
    assert (read_number("1.234", "."), read_number("1,234", ".")) == (1.234, 1234.0)
    assert read_number("1.23", ",") == 1.23 and read_number("0.125", ",") == 0.125, "only what is ambiguous"
