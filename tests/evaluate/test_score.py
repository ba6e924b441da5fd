"""What is read from an answer, and what the metrics over answers are, by hand-computed numbers."""

import random
from collections.abc import Iterator

import pytest

from phi3v_dist.config import FieldSettings
from phi3v_dist.evaluate.score import likeness, read_field, score_answer, summarize
from phi3v_dist.observe.metrics import check

PRICE = FieldSettings(pattern=r"Price: (\S+)", kind="number")
COLOUR = FieldSettings(pattern=r"Colour: (.*?)(?:,|$)")
FIELDS = {"price": PRICE, "colour": COLOUR}


def score(text, target, fields=FIELDS, stopped=True, num_tokens=10):
    return score_answer(text, target, fields, stopped, num_tokens)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Price: 120", 120.0),
        ("Price: 1,299.50", 1299.5),
        ("Price: 12,345,678", 12_345_678.0),
        ("Price: 0", 0.0),
        ("Price: -3.5", -3.5),
        ("Price: 1299.50.", 1299.5),  # the end of a sentence
        ("Price: 120, in red", 120.0),
        ("Price: 1e3", 1000.0),
        ("Price: nan", None),
        ("Price: inf", None),
        ("Price: " + "9" * 400, None),  # no finite number
        ("Price: unknown", None),
        ("Price: 12.3.4", None),
        ("Price: .", None),
        ("Price: ", None),
        ("price: 120", None),
        ("", None),
    ],
)
def test_a_number_is_read_with_its_separators_or_not_at_all(text, value):
    assert read_field(text, PRICE) == value


def test_text_is_read_trimmed_and_over_line_ends():
    assert read_field("Colour:  dark red , Price: 3", COLOUR) == "dark red"
    assert read_field("Colour: dark\nred, x", COLOUR) == "dark\nred"


def test_a_group_that_took_part_in_no_match_is_no_value():
    optional = FieldSettings(pattern=r"Price:(?: ([0-9]+))?", kind="number")
    assert read_field("Price: none", optional) is None


def test_one_answer_is_compared_field_by_field():
    result = score("Colour: red, Price: 110", "Colour: red, Price: 100")
    price, colour = result.fields["price"], result.fields["colour"]
    assert (price.target, price.prediction, price.correct, price.error) == (100.0, 110.0, False, 10.0)
    assert (colour.target, colour.prediction, colour.correct, colour.error) == ("red", "red", True, None)
    assert result.parsed


def test_numbers_are_right_however_they_are_written():
    assert score("Price: 1,200.00", "Price: 1200").fields["price"].correct


def test_a_field_that_the_truth_does_not_have_is_not_asked_for():
    result = score("Colour: blue", "Colour: blue")
    assert result.fields.keys() == {"colour"}
    assert result.parsed
    assert score("anything", "hello").fields == {} and score("anything", "hello").parsed


def test_an_answer_lacking_one_of_the_truths_fields_is_not_parsed():
    result = score("Colour: red, Price: dear", "Colour: red, Price: 100")
    assert not result.parsed
    assert (result.fields["price"].prediction, result.fields["price"].error) == (None, None)
    assert not result.fields["price"].correct and result.fields["colour"].correct


def test_metrics_are_those_computed_by_hand():
    scores = [
        score("Colour: red, Price: 100", "Colour: red, Price: 100", num_tokens=8),
        score("Colour: red, Price: 110", "Colour: blue, Price: 100", num_tokens=10),
        score("Colour: red, Price: 70", "Colour: red, Price: 50", num_tokens=12),
        score("no idea", "Colour: red, Price: 40", stopped=False, num_tokens=30),
        score("hello", "hello", num_tokens=0),  # a truth without fields
    ]
    assert summarize(scores) == pytest.approx({
        "eval/samples": 5,
        "eval/parse_fail_pct": 20.0,
        "eval/stop_pct": 80.0,
        "eval/gen_tokens/mean": 12.0,
        "eval/field_em/colour": 2 / 4,
        "eval/field_em/price": 1 / 4,
        "eval/price_mae": (0 + 10 + 20) / 3,
        "eval/price_within_10pct": 2 / 3,
        "eval/price_median_ape_pct": 10.0,
    })  # fmt: skip


def test_every_name_is_in_the_registry_also_for_the_blind_control():
    scores = [score("Colour: red, Price: 1", "Colour: red, Price: 2")]
    check(summarize(scores))
    blind = summarize(scores, "eval/blind")
    check(blind)
    assert all(name.startswith("eval/blind/") for name in blind)


@pytest.mark.parametrize(
    ("prediction", "truth", "within"),
    [
        ("110", "100", 1), ("90", "100", 1), ("110.01", "100", 0), ("89.99", "100", 0),
        ("21.89", "19.90", 1),  # exactly 10 %, though not in binary fractions
        ("0", "0", 1), ("0.01", "0", 0), ("-110", "-100", 1), ("-89", "-100", 0), ("100", "-100", 0),
    ],
)  # fmt: skip
def test_within_ten_percent_is_of_the_truths_size(prediction, truth, within):
    metrics = summarize([score(f"Price: {prediction}", f"Price: {truth}")])
    assert metrics["eval/price_within_10pct"] == within


def test_a_truth_of_zero_has_an_error_and_no_percentage():
    metrics = summarize([score("Price: 5", "Price: 0")])
    assert metrics["eval/price_mae"] == 5.0
    assert "eval/price_median_ape_pct" not in metrics
    both = summarize([score("Price: 5", "Price: 0"), score("Price: -15", "Price: -10")])
    assert (both["eval/price_mae"], both["eval/price_median_ape_pct"]) == (5.0, 50.0)


def test_when_nothing_can_be_read_there_is_no_error_of_zero():
    metrics = summarize([score("?", "Colour: red, Price: 100", stopped=False)] * 3)
    assert metrics == {
        "eval/samples": 3.0, "eval/parse_fail_pct": 100.0, "eval/stop_pct": 0.0, "eval/gen_tokens/mean": 10.0,
        "eval/field_em/colour": 0.0, "eval/field_em/price": 0.0,
    }  # fmt: skip


def test_over_no_answers_there_are_no_metrics():
    assert summarize([]) == {}


AWKWARD = [  # answer, title right, category right, price read, of the truth "Red Coat", "COATS", 1299
    ("Product: Red Coat, Category: COATS, Full Price: 1299", 1, 1, 1299),
    ("Product: Red Coat, Category: COATS, Full Price: 1,299", 1, 1, 1299),
    ("Product: Red Coat, Category: COATS, Full Price: $1,299", 1, 1, 1299),
    ("Product: Red Coat, Category: COATS, Full Price: 1.299,00", 1, 1, 1299),
    ("Product: Red Coat, Category: COATS, Full Price: 1.234,50", 1, 1, 1234.5),
    ("Product: Red Coat, Category: COATS, Full Price: 1 299 €", 1, 1, 1299),
    ("Product: Red Coat, Category: COATS, Full Price: USD 1299.00.", 1, 1, 1299),
    ("Product: Red Coat, Category: COATS, Full Price: ١٢٩٩", 1, 1, 1299),
    ("Product: Red Coat, Category: COATS, Full Price: १,२९९", 1, 1, 1299),
    ("Product: Red Coat, Category: COATS, Full Price: １２９９", 1, 1, 1299),
    ("Product: Red Coat, Category: COATS, Full Price: 1299 or 1399", 1, 1, None),
    ("Product: Red Coat, Category: COATS, Full Price: 1299-1399", 1, 1, None),
    ("Product: Red Coat, Category: COATS, Full Price: twelve hundred", 1, 1, None),
    ("Product: Red Coat, Category: COATS, Full Price: ", 1, 1, None),
    ("Product: Red Coat, Category: COATS, Full Price: 1,29,9", 1, 1, None),
    ("Product: Red Coat, Category: COATS, Full Price: -1299", 1, 1, -1299),
    ("Product: Red Coat, Category: COATS, Full Price: 0", 1, 1, 0),
    ("Product: Red Coat, Category: COATS, Full Price: 1.299e3", 1, 1, 1299),
    ("Product: Red Coat, Category: COATS, Full Price: nan", 1, 1, None),
    ("Product: Red Coat, Category: COATS, Full", 1, 0, None),  # unfinished: what follows the category is not there
    ("Product: Red Coat, Category: COA", 1, 0, None),
    ("Product: Red Co", 0, 0, None),
    ("", 0, 0, None),
    ("1299", 0, 0, None),
    ("Full Price: 1299, Category: COATS, Product: Red Coat", 0, 0, None),  # the order of fields is wrong
    ("product: Red Coat, category: COATS, full price: 1299", 0, 0, None),
    ("Product:  Red Coat , Category: COATS , Full Price: 1299 ", 1, 1, 1299),
    ("Product: red coat, Category: Coats, Full Price: 1300", 0, 0, 1300),
    ("Product: Red Coat, Category: COATS, Full Price: 1299\nProduct: Hat, Category: HATS, Full Price: 5", 1, 1, None),
    ("Well! Product: Red Coat, Category: COATS, Full Price: 1169.1", 1, 1, 1169.1),
]


def test_scores_of_awkward_answers_are_those_computed_by_hand():
    fields = {
        "title": FieldSettings(pattern="Product: (.*?), Category:"),
        "category": FieldSettings(pattern="Category: (.*?), Full Price:"),
        "price": FieldSettings(pattern="Full Price: (.*)", kind="number"),
    }
    truth = "Product: Red Coat, Category: COATS, Full Price: 1299"
    scores = [score(text, truth, fields) for text, *_ in AWKWARD]
    for (text, title, category, price), one in zip(AWKWARD, scores, strict=True):
        right = one.fields["title"].correct, one.fields["category"].correct, one.fields["price"].prediction
        assert right == (bool(title), bool(category), price), text
    metrics = summarize(scores)
    errors = [abs(price - 1299) for *_, price in AWKWARD if price is not None]
    assert len(AWKWARD) == 30 and len(errors) == 16
    assert metrics["eval/price_mae"] == pytest.approx((64.5 + 2598 + 1299 + 1 + 129.9) / 16)
    assert metrics["eval/price_within_10pct"] == 14 / 16 and metrics["eval/price_median_ape_pct"] == 0.0
    assert metrics["eval/field_em/title"] == 24 / 30 and metrics["eval/field_em/category"] == 22 / 30
    assert metrics["eval/field_em/price"] == 11 / 30 and metrics["eval/parse_fail_pct"] == pytest.approx(1400 / 30)


def test_a_field_of_json_is_found_wherever_the_object_stands():
    price = FieldSettings(key="price.amount", kind="number")
    colour = FieldSettings(key="colour")
    text = 'I see {this}: {"colour": " red ", "price": {"amount": 1299.5, "currency": "EUR"}} – done'
    assert (read_field(text, price), read_field(text, colour)) == (1299.5, "red")
    assert read_field('{"price": {"amount": "1,299"}}', price) == 1299.0
    for other in (
        '{"price": 5}',
        '{"price": {"amount": null}}',
        '{"price": {"amount": [1]}}',
        '{"price": {"amount"',
        "[]",
    ):
        assert read_field(other, price) is None
    assert read_field('{"colour": true}', colour) == "true"


def test_fuzzy_fields_say_how_alike_texts_are():
    name = {"name": FieldSettings(pattern="(.*)", kind="fuzzy")}
    scores = [score(text, "Burberry Check", name) for text in ("burberry  check", "Burbery Check", "Chair", "")]
    metrics = summarize(scores)
    assert metrics["eval/anls/name"] == pytest.approx((1 + 13 / 14 + 0 + 0) / 4)
    assert metrics["eval/field_em/name"] == 0.0, "exactly is another question"
    check(metrics)


def reference_likeness(found: str, truth: str) -> float:
    """ANLS as its paper defines it (arXiv 1907.00490), row by row of the table of edits."""
    one, other = (" ".join(text.casefold().split()) for text in (found, truth))
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        above, row[0] = row[0], i
        for j, wanted in enumerate(other, start=1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (letter != wanted))
    alike = 1 - row[-1] / max(len(one), len(other), 1)
    return alike if alike >= 0.5 else 0.0


def random_pairs(number: int) -> Iterator[tuple[str, str]]:
    """Texts and edited copies of them: few letters, so that many edits cancel, and some that casefold changes."""
    chance = random.Random(0)
    letters = "abAB  \tßİé漢🙂"
    for _ in range(number):
        text = [chance.choice(letters) for _ in range(chance.randrange(40))]
        other = list(text)
        for _ in range(chance.randrange(len(text) + 2)):
            place = chance.randrange(len(other) + 1)
            other[place : place + chance.randrange(2)] = chance.choice(["", *letters])
        yield "".join(text), "".join(other)


def test_likeness_is_that_of_the_paper_on_1000_random_pairs():
    pairs = list(random_pairs(1000))
    found = [likeness(one, other) for one, other in pairs]
    assert found == [reference_likeness(one, other) for one, other in pairs]
    assert 0.0 in found and 1.0 in found and len(set(found)) > 100, "the pairs cover near, far and equal texts"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [("", "", 1.0), ("", "a", 0.0), ("ab", "ax", 0.5), ("abc", "axx", 0.0), (" A  b ", "a B", 1.0)],
)
def test_likeness_at_its_limits(one, other, expected):
    assert likeness(one, other) == reference_likeness(one, other) == expected


def test_relaxed_fields_are_right_within_five_percent_and_as_text_where_the_truth_is_one():
    answer = {"answer": FieldSettings(pattern="(.+)", kind="relaxed")}
    cases = [
        ("105", "100", 1),
        ("94.9", "100", 0),
        ("Yes", "yes", 1),
        ("no", "yes", 0),
        ("100", "many", 0),
        ("?", "7", 0),
    ]
    scores = [score(text, truth, answer) for text, truth, _ in cases]
    assert [one.fields["answer"].correct for one in scores] == [bool(right) for *_, right in cases]
    metrics = summarize(scores)
    assert metrics["eval/relaxed_accuracy/answer"] == 2 / 6 and "eval/answer_mae" not in metrics
    check(metrics)


@pytest.mark.parametrize("words", [{}, {"pattern": "(a)", "key": "a"}, {"key": ""}])
def test_a_field_is_read_in_one_way(words):
    with pytest.raises(ValueError, match="pattern|at least 1"):
        FieldSettings(**words)
