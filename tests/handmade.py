"""A seed → 300 pictures and a `captions.csv`, as a person's folder has them: made by hand, saved by Excel.

What comes in: an empty folder. What goes out: pictures of many sizes and formats in it and in a folder below, a table
beside them, and `Handmade`: what an import should find. Surprise: nothing is exotic. Umlauts that a Mac stored in
pieces, turned photos, a page of an error saved as .jpg, empty rows at the end: each was in somebody's folder.
"""

import csv
import io
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (205, 40, 40), "green": (40, 150, 60), "blue": (45, 80, 200), "yellow": (235, 200, 40),
    "white": (240, 240, 240), "black": (25, 25, 30),
}  # fmt: skip
THINGS = ("disc", "box", "wedge", "ring")
PLACES = ("in the café", "on the desk, near the window", 'at the "Goldener Löwe"', "in the garden; it rains", "at home")
SIZES = ((640, 480), (480, 640), (1200, 900), (400, 400), (1600, 500), (320, 240))
HEADER = ("File name", "Caption", "Thing", "Price (EUR)")
ORIENTATION = 0x0112  # EXIF


@dataclass(frozen=True)
class Handmade:
    """num_good: rows that can become samples. bad: kind of mistake → how many rows have it."""

    table: Path
    num_good: int
    bad: dict[str, int]


def write_folder(folder: Path, num_pictures: int = 300, seed: int = 0) -> Handmade:
    """Write the pictures and the table. Returns what is right and wrong with them."""
    rng = np.random.default_rng(seed)
    (folder / "Ausflug 2023").mkdir(parents=True)
    rows: list[tuple[str, ...]] = []
    bad = {"picture unreadable": 0, "no such picture": 0, "nothing to learn": 0}
    for n in range(num_pictures):
        colour, thing = str(rng.choice(list(COLOURS))), str(rng.choice(THINGS))
        name, data = _file(n, _photo(rng, colour, thing, SIZES[n % len(SIZES)]), rng)
        caption = f"A {colour} {thing} {PLACES[n % len(PLACES)]}"
        if n in (50, num_pictures // 2):  # a download that was cut, and the error page of a shop
            data = data[: len(data) // 3] if n == 50 else b"<html><body>404 Not Found</body></html>"
            bad["picture unreadable"] += 1
        if n == 40:
            caption, bad["nothing to learn"] = "", 1
        if n == 41:
            caption += "\nbought there, too"
        # A Mac stores é as e and an accent; the table has it in one piece
        (folder / (unicodedata.normalize("NFD", name) if n % 60 == 7 else name)).write_bytes(data)
        shown = name.replace("/", "\\") if n % 40 == 3 else name  # typed under Windows
        rows.append((shown, caption, thing, f"{rng.integers(5, 90)},{rng.integers(0, 99):02d}"))
    rows[10] = ("Kalender.jpg", *rows[10][1:])  # deleted long ago
    bad["no such picture"] = 1
    rows += [("", "", "", "")] * 3  # below the last row, as Excel leaves them
    table = folder / "captions.csv"
    text = io.StringIO()
    csv.writer(text, delimiter=";", lineterminator="\r\n").writerows([HEADER, *rows])
    table.write_bytes(text.getvalue().encode("utf-8-sig"))
    return Handmade(table, num_pictures - sum(bad.values()), {kind: count for kind, count in bad.items() if count})


def _photo(rng: np.random.Generator, colour: str, thing: str, size: tuple[int, int]) -> Image.Image:
    """A thing before a background that is uneven and noisy."""
    width, height = size
    ramp = np.linspace(0, 60, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    ground = rng.integers(60, 130, 3) + ramp + rng.normal(0, 6, (height, width, 3))
    picture = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    draw, radius = ImageDraw.Draw(picture), int(min(size) * rng.uniform(0.28, 0.45))
    x, y = (int(rng.integers(radius, side - radius + 1)) for side in size)
    around = (x - radius, y - radius, x + radius, y + radius)
    match thing:
        case "disc":
            draw.ellipse(around, fill=COLOURS[colour])
        case "box":
            draw.rectangle(around, fill=COLOURS[colour])
        case "wedge":
            draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=COLOURS[colour])
        case _:
            draw.ellipse(around, outline=COLOURS[colour], width=max(8, radius // 3))
    return picture


def _file(n: int, photo: Image.Image, rng: np.random.Generator) -> tuple[str, bytes]:
    """(name, bytes), as cameras, phones, scanners and screenshots store them."""
    buffer = io.BytesIO()
    match n % 12:
        case 0 | 1 | 2:
            photo.save(buffer, "JPEG", quality=88)
            name = f"IMG_{2000 + n}.JPG"
        case 3:
            photo.save(buffer, "JPEG", quality=75)
            name = f"Ausflug 2023/Bild {n} (Kopie).jpg"
        case 4:  # a phone that was held upright
            exif = Image.Exif()
            exif[ORIENTATION] = int(rng.choice([3, 6, 8]))
            photo.save(buffer, "JPEG", quality=85, exif=exif)
            name = f"PXL_{n:05d}.jpg"
        case 5:
            photo.save(buffer, "PNG")
            name = f"Bildschirmfoto {n}.png"
        case 6:
            photo.convert("RGBA").save(buffer, "PNG")
            name = f"freigestellt-{n}.png"
        case 7:
            photo.save(buffer, "JPEG", quality=92)
            name = f"Café Übersicht {n}.jpeg"
        case 8:
            photo.save(buffer, "WEBP", quality=80)
            name = f"{n}.webp"
        case 9:
            photo.convert("L").convert("RGB").save(buffer, "JPEG") if n > 200 else photo.convert("P").save(
                buffer, "PNG"
            )
            name = f"alt_{n}" + (".jpg" if n > 200 else ".png")
        case 10:
            photo.convert("CMYK").save(buffer, "JPEG")
            name = f"druck,{n}.jpg"
        case _:
            photo.save(buffer, "PNG")
            name = f"{n}.jpg"  # named for what it is not
    return name, buffer.getvalue()
