"""`Product` → the turns of its conversation.

What comes in: a product, and a random generator for the words that do not matter. What goes out: question and answer
in the `messages` form. Surprise: a sample in words only is answered in the same words as one with a photo, so that one
set of patterns reads every answer.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from phi3v_dist.data.importers.catalogue.garments import COLOURS, GARMENTS, PATTERNS, TRIMS, Look
from phi3v_dist.data.importers.catalogue.plan import CatalogueSettings, Product, expected_price, random_look

QUESTIONS = {
    "photo": "What is shown in this image?",
    "photos": "What is shown in these images?",
    "card": "Which product is on this card?",
    "page": "Which product is article {article} on this page?",
    "document": "Which product is article {article}?",
}
NOTE_SENTENCES = (
    "The photo was taken in our studio this morning.",
    "Orders placed before noon leave the warehouse on the same day.",
    "Returns are free within thirty days when the label is still in place.",
    "Please keep the box, it is made to be used again.",
    "Our customer service answers every letter by hand.",
    "A gift card can be added at the till or online.",
    "Members of the club are told first when something new arrives.",
    "Delivery to an island may take two days longer.",
)
PAGE_SENTENCES = (
    "Wash wool by hand in cold water and let it dry flat, away from the sun.",
    "Brush leather with a soft cloth after every walk in the rain.",
    "Never iron a print from the outside; turn it first and use a cool iron.",
    "Silk should be kept in the dark and folded along a different line each season.",
    "A loose thread is cut, not pulled.",
    "Store cotton in a dry place and let it breathe between two wears.",
    "Repairs are made in our workshop, usually within ten working days.",
    "The number of an article is printed on the back of its tag.",
    "Prices on this page hold until the next page is printed.",
    "Measures are taken lying flat and may differ by one centimetre.",
)


def conversation(
    product: Product, photos: list[str], settings: CatalogueSettings, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """A user turn with the photos and the question, and the assistant's answer."""
    question = QUESTIONS[product.kind]
    if product.kind == "card":
        question = f"{_card(product)}\n{question}"
    if product.kind == "page":
        low, high = np.log(settings.document_words)
        page, article = _page(product, round(np.exp(rng.uniform(low, high))), rng)
        question = f"{page}\n{question.format(article=article)}"
    if note := _note(int(rng.integers(settings.note_words[0], settings.note_words[1] + 1)), rng):
        question = f"{question}\n{note}"
    shown = [{"type": "image", "image": name} for name in photos]
    return [
        {"role": "user", "content": [*shown, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer(product.look, product.full_price)}]},
    ]


def answer(look: Look, full_price: int) -> str:
    """What a model has to say."""
    return f"Product: {look.title}, Category: {look.category}, Full Price: {full_price}"


def vocabulary_text() -> Iterator[str]:
    """Sentences with every word that a catalogue can hold, for training a small tokenizer."""
    rng = np.random.default_rng(0)
    yield from NOTE_SENTENCES
    yield from PAGE_SENTENCES
    for category in GARMENTS:
        for colour in COLOURS:
            for pattern in PATTERNS:
                for trim in TRIMS:
                    look = Look(category, colour, pattern, trim, limited=bool(rng.random() < 0.5))
                    product = Product(0, "train", "catalogue", "card", look, round(expected_price(look)))
                    yield answer(look, product.full_price)
                    yield f"{_card(product)}\n{QUESTIONS['card']}"
                    yield _article_line(int(rng.integers(10**5)), look, product.full_price)
                    yield QUESTIONS["page"].format(article=rng.integers(10**5))
                    yield from (QUESTIONS["photo"], QUESTIONS["photos"])


def _card(product: Product) -> str:
    look = product.look
    facts = {
        "Item": GARMENTS[look.category].noun,
        "Colour": look.colour,
        "Pattern": PATTERNS[look.pattern] or "Plain",
        "Trim": TRIMS[look.trim].removeprefix("with ") or "None",
        "Edition": "Limited" if look.limited else "Regular",
        "Category": look.category,
        "Full Price": product.full_price,
    }
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def _page(product: Product, num_words: int, rng: np.random.Generator) -> tuple[str, int]:
    """A page of `num_words` words at most and one line less at least, and the article number of the product on it.

    The other articles on it are nobody's products: drawn here, sold nowhere, photographed never.
    """
    own, *others = rng.choice(10**5, size=num_words // 8 + 1, replace=False).tolist()
    own_line = _article_line(own, product.look, product.full_price)
    lines, left = [], num_words - len(own_line.split())
    for number in others:
        if rng.random() < 0.5:
            line = PAGE_SENTENCES[rng.integers(len(PAGE_SENTENCES))]
        else:
            look = random_look(rng, list(GARMENTS)[rng.integers(len(GARMENTS))])
            line = _article_line(number, look, round(expected_price(look)))
        left -= len(line.split())
        if left < 0:
            break
        lines.append(line)
    lines.insert(int(rng.integers(len(lines) + 1)), own_line)
    return "\n".join(lines), own


def _article_line(article: int, look: Look, full_price: int) -> str:
    return f"Article {article}: {look.title}, {look.category}, {full_price}."


def _note(num_words: int, rng: np.random.Generator) -> str:
    """Exactly so many words of small talk."""
    words: list[str] = []
    while len(words) < num_words:
        words += NOTE_SENTENCES[rng.integers(len(NOTE_SENTENCES))].split()
    return " ".join(words[:num_words])
