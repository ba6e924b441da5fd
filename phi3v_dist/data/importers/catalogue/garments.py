"""What a catalogue can sell: its categories as outlines, its colours, patterns and trims, and `Look`.

What comes in: nothing, these are data. What goes out: `GARMENTS` and the other tables, from which `drawing` draws and
`plan` prices. Surprise: an outline is a handful of points in the square [-1, 1]² (y down) whose corners are cut
round; a point given twice stays a corner.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Curve = Float[np.ndarray, "_ 2"]  # points, open or closed; one garment has curves of many lengths
Point = tuple[float | int, float | int]
Colour = tuple[int, int, int]

CREAM, CHARCOAL = (252, 246, 232), (48, 44, 50)

# Name → (fabric, ink of the pattern). Hues far enough apart to survive the light of `drawing.light_and_noise`.
COLOURS: dict[str, tuple[Colour, Colour]] = {
    "Red": ((208, 28, 38), CREAM),
    "Orange": ((245, 130, 24), CREAM),
    "Yellow": ((252, 216, 52), CHARCOAL),
    "Green": ((26, 146, 74), CREAM),
    "Blue": ((34, 92, 212), CREAM),
    "Purple": ((120, 54, 168), CREAM),
    "Pink": ((250, 112, 178), CREAM),
    "Black": ((38, 38, 44), CREAM),
}
PATTERNS = {"plain": "", "stripes": "Striped", "dots": "Dotted", "check": "Check"}  # pattern → its word in a title
TRIMS = {"none": "", "bow": "with Bow", "gold": "with Gold Trim"}


def smooth(points: Sequence[Point], closed: bool = True) -> Curve:
    """Rounds corners by cutting them twice (Chaikin 1974); a point given twice stays a corner."""
    curve = np.asarray(points, dtype=np.float64)
    for _ in range(2):
        following = np.roll(curve, -1, axis=0) if closed else curve[1:]
        current = curve if closed else curve[:-1]
        cut = np.stack([0.75 * current + 0.25 * following, 0.25 * current + 0.75 * following], axis=1).reshape(-1, 2)
        curve = cut if closed else np.concatenate([curve[:1], cut, curve[-1:]])
    return curve


def symmetric(right_half: Sequence[Point]) -> Curve:
    """A closed outline from its right half, given from the top of the middle axis to its bottom."""
    return smooth([*right_half, *((-x, y) for x, y in reversed(right_half))])


def fringe(start: Point, end: Point, teeth: int = 5) -> list[Point]:
    """The zigzag from `start` to `end` at the end of a scarf, pointing to the left of that direction."""
    first, last = np.array(start), np.array(end)
    outward = np.array([(last - first)[1], -(last - first)[0]]) * 0.26
    places = np.linspace(first, last, 2 * teeth + 1)
    places[1::2] += outward
    return [(x, y) for x, y in places.repeat(2, axis=0).tolist()]


def line(*points: Point) -> Curve:
    """An open curve."""
    return smooth(points, closed=False)


def both_sides(*curves: Curve) -> tuple[Curve, ...]:
    """Each curve and its mirror image."""
    return tuple(side for curve in curves for side in (curve, curve * (-1, 1)))


@dataclass(frozen=True)
class Garment:
    """The outlines of one category, each a curve in [-1, 1]².

    noun: its word in a title.
    fabric: closed; filled with the colour and the pattern. openings: closed; what shows through the fabric.
    stuff: colour of all that is not cloth: leather, steel, rubber, the dummy that wears it. Each category has its own,
        which no cloth has, because a small model from random weights reads colours long before it reads outlines.
    behind, front: closed, of this stuff, before and over the fabric. straps: open, thick, behind. buttons: in front.
    seams: open, thin. hems: open; where gold trim runs.
    bow, tag: where a bow sits and where the hang tag is tied.
    """

    noun: str
    fabric: tuple[Curve, ...]
    hems: tuple[Curve, ...]
    bow: Point
    tag: Point
    stuff: Colour
    openings: tuple[Curve, ...] = ()
    behind: tuple[Curve, ...] = ()
    front: tuple[Curve, ...] = ()
    straps: tuple[Curve, ...] = ()
    seams: tuple[Curve, ...] = ()
    buttons: tuple[Point, ...] = ()


GARMENTS: dict[str, Garment] = {
    "COATS": Garment(
        noun="Coat",
        stuff=(122, 112, 48),
        fabric=(
            symmetric(
                [(0, -0.86), (0.12, -0.96), (0.3, -0.94), (0.52, -0.84), (0.62, -0.7), (0.97, 0.26), (0.97, 0.26),
                 (0.72, 0.36), (0.72, 0.36), (0.47, -0.3), (0.47, -0.1), (0.5, 0.3), (0.6, 0.97), (0.6, 0.97),
                 (0, 0.97)]
            ),
        ),
        hems=(*both_sides(line((0.99, 0.17), (0.7, 0.28))), line((-0.6, 0.92), (0, 0.92), (0.6, 0.92))),
        bow=(0, -0.62),
        tag=(0.62, 0.42),
        front=(np.array([(-0.49, 0.02), (0.49, 0.02), (0.5, 0.15), (-0.5, 0.15)]),),
        seams=(line((0.06, -0.5), (0.06, 0.97)), *both_sides(line((0.12, -0.95), (0.34, -0.62), (0.06, -0.3)))),
        buttons=tuple((x, y) for x in (-0.1, 0.2) for y in (-0.22, 0.34, 0.6)),
    ),
    "DRESSES": Garment(
        noun="Dress",
        stuff=(236, 192, 160),
        fabric=(
            symmetric(
                [(0, -0.5), (0.12, -0.52), (0.2, -0.8), (0.2, -0.8), (0.36, -0.78), (0.36, -0.78), (0.34, -0.5),
                 (0.3, -0.3), (0.24, -0.2), (0.4, 0.1), (0.95, 0.84), (0.95, 0.84), (0.6, 0.97), (0, 0.98)]
            ),
        ),
        behind=(
            symmetric(
                [(0, -1.02), (0.13, -1.02), (0.13, -1.02), (0.13, -0.84), (0.42, -0.76), (0.44, -0.6), (0.3, -0.4),
                 (0, -0.3)]
            ),
        ),
        hems=(
            line((-0.26, -0.2), (0, -0.17), (0.26, -0.2)),
            line((-0.88, 0.8), (-0.55, 0.89), (0, 0.92), (0.55, 0.89), (0.88, 0.8)),
        ),
        bow=(0, -0.3),
        tag=(0.56, -0.56),
        seams=(*both_sides(line((0.1, -0.05), (0.36, 0.86))), line((0, -0.05), (0, 0.86))),
    ),
    "TROUSERS": Garment(
        noun="Trousers",
        stuff=(176, 184, 196),
        fabric=(
            symmetric(
                [(0, -0.78), (0.46, -0.78), (0.46, -0.78), (0.58, -0.3), (0.72, 0.97), (0.72, 0.97), (0.26, 0.97),
                 (0.26, 0.97), (0.06, -0.14), (0, -0.18)]
            ),
        ),
        front=(
            np.array([(-0.56, -0.94), (0.56, -0.94), (0.56, -0.8), (-0.56, -0.8)]),
            *both_sides(np.array([(0.24, -0.88), (0.4, -0.88), (0.4, -0.64), (0.24, -0.64)])),
        ),
        straps=(line((0, -0.9), (0, -1.04), (0.14, -1.04)),),
        hems=(*both_sides(line((0.27, 0.88), (0.71, 0.88))), line((-0.5, -0.6), (0, -0.6), (0.5, -0.6))),
        bow=(0, -0.5),
        tag=(0.7, -0.66),
        seams=(line((0, -0.78), (0, -0.18)), *both_sides(line((0.28, -0.56), (0.38, -0.42), (0.54, -0.36)))),
    ),
    "BAGS": Garment(
        noun="Bag",
        stuff=(146, 84, 40),
        fabric=(
            symmetric(
                [(0, -0.3), (0.76, -0.3), (0.76, -0.3), (0.86, 0.1), (0.95, 0.86), (0.9, 0.94), (0.8, 0.95), (0, 0.95)]
            ),
        ),
        hems=(line((-0.94, 0.8), (0, 0.8), (0.94, 0.8)), line((-0.76, -0.22), (0, -0.22), (0.76, -0.22))),
        bow=(0, 0.42),
        tag=(0.66, -0.66),
        front=(np.array([(-0.1, -0.34), (0.1, -0.34), (0.1, -0.02), (-0.1, -0.02)]),),
        straps=(line((-0.46, -0.28), (-0.46, -0.7), (-0.3, -0.93), (0.3, -0.93), (0.46, -0.7), (0.46, -0.28)),),
        seams=(line((-0.7, -0.12), (0, 0.12), (0.7, -0.12)),),
        buttons=((0, -0.1),),
    ),
    "SHOES": Garment(
        noun="Boot",
        stuff=(222, 184, 128),
        fabric=(
            smooth(
                [(-0.78, -0.92), (-0.78, -0.92), (0.06, -0.92), (0.06, -0.92), (0.0, -0.2), (0.14, 0.1), (0.6, 0.26),
                 (0.96, 0.42), (0.97, 0.74), (0.97, 0.74), (-0.84, 0.74), (-0.84, 0.74), (-0.7, 0.1)]
            ),
        ),
        hems=(line((-0.79, -0.83), (0.06, -0.83)), line((-0.82, 0.64), (0.96, 0.64))),
        bow=(0.06, 0.2),
        tag=(0.56, -0.56),
        front=(
            np.array([(-0.88, 0.72), (1.0, 0.72), (1.0, 0.86), (-0.1, 0.86), (-0.16, 0.97), (-0.88, 0.97)]),
        ),
        seams=(line((-0.7, 0.1), (-0.4, 0.24), (-0.34, 0.72)), line((0.5, 0.24), (0.46, 0.5), (0.6, 0.72))),
    ),
    "SCARVES": Garment(
        noun="Scarf",
        stuff=(186, 176, 206),
        fabric=(
            smooth(
                [(0, -0.36), (0.4, -0.4), (0.4, -0.4), (0.6, 0.1), *fringe((0.8, 0.56), (0.36, 0.66)), (0.2, 0.1)]
            ),
            smooth(
                [(-0.36, -0.36), (0.1, -0.36), (0.1, -0.36), (0.06, 0.2), *fringe((0.04, 0.82), (-0.56, 0.82)),
                 (-0.5, 0.2)]
            ),
            smooth([(-0.5, -0.36), (-0.8, -0.7), (-0.5, -0.98), (0.5, -0.98), (0.8, -0.7), (0.5, -0.36), (0, -0.26)]),
            smooth([(-0.24, -0.6), (0.2, -0.62), (0.26, -0.2), (0.1, -0.1), (-0.1, -0.1), (-0.28, -0.2)]),
        ),
        hems=(line((-0.55, 0.7), (0.04, 0.7)), line((0.34, 0.54), (0.76, 0.45))),
        bow=(0, -0.34),
        tag=(0.72, -0.5),
        behind=(
            symmetric(
                [(0, -1.04), (0.26, -1.04), (0.26, -1.04), (0.26, -0.6), (0.5, -0.36), (0.86, -0.22), (0.94, 0.1),
                 (0.9, 0.98), (0.9, 0.98), (0, 0.98)]
            ),
        ),
        openings=(smooth([(-0.5, -0.8), (-0.2, -0.9), (0.2, -0.9), (0.5, -0.8), (0.2, -0.7), (-0.2, -0.7)]),),
        seams=both_sides(line((0.66, -0.8), (0.5, -0.56), (0.26, -0.5))),
    ),
    "HATS": Garment(
        noun="Hat",
        stuff=(84, 52, 40),
        fabric=(
            symmetric([(0, -0.72), (0.24, -0.78), (0.5, -0.66), (0.56, 0.0), (0.6, 0.34), (0, 0.4)]),
            symmetric([(0, 0.2), (0.56, 0.24), (0.9, 0.18), (1.0, 0.34), (0.7, 0.62), (0, 0.7)]),
        ),
        hems=(line((-0.92, 0.32), (-0.66, 0.52), (0, 0.6), (0.66, 0.52), (0.92, 0.32)),),
        bow=(0.36, 0.1),
        tag=(0.78, -0.46),
        front=(np.array([(-0.57, 0.02), (0, 0.1), (0.57, 0.02), (0.59, 0.26), (0, 0.34), (-0.59, 0.26)]),),
        seams=(line((-0.2, -0.74), (0, -0.5), (0.2, -0.74)),),
    ),
    "UMBRELLAS": Garment(
        noun="Umbrella",
        stuff=(70, 104, 128),
        fabric=(
            symmetric(
                [(0, -0.86), (0.4, -0.84), (0.92, -0.5), (0.99, 0.12), (0.99, 0.12), (0.82, 0), (0.66, 0.12),
                 (0.66, 0.12), (0.5, 0), (0.33, 0.12), (0.33, 0.12), (0.16, 0), (0, 0.12), (0, 0.12)]
            ),
        ),
        hems=(line((-0.95, -0.06), (-0.5, -0.1), (0, -0.11), (0.5, -0.1), (0.95, -0.06)),),
        bow=(0, -0.5),
        tag=(0.5, 0.3),
        straps=(line((0, -1.0), (0, -0.8)), line((0, 0.0), (0, 0.84), (0.04, 0.97), (0.22, 0.97), (0.26, 0.8))),
        seams=both_sides(line((0, -0.86), (0.28, -0.5), (0.33, 0.12)), line((0, -0.86), (0.56, -0.6), (0.66, 0.12))),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What can be seen of a product, and asked about it.

    category: a key of `GARMENTS`; colour of `COLOURS`; pattern of `PATTERNS`; trim of `TRIMS`.
    limited: limited edition, which wears a black hang tag instead of a white one.
    """

    category: str
    colour: str
    pattern: str
    trim: str
    limited: bool

    @property
    def title(self) -> str:
        """For example "Limited Red Striped Dress with Bow"."""
        words = ("Limited" if self.limited else "", self.colour, PATTERNS[self.pattern])
        return " ".join(word for word in (*words, GARMENTS[self.category].noun, TRIMS[self.trim]) if word)
