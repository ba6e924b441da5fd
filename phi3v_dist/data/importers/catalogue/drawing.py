"""`Look` (what a product is) → one photo of it, as it could stand in a shop's catalogue.

What comes in: a look, and a random generator for everything that is *not* asked (pose, mirror, scale, background,
shade of the cloth, light, sensor noise). What goes out: an RGB picture. Surprise: no pixel is ever rotated. A `View`
moves the outlines' points, the picture is drawn at twice its size and halved: smooth edges at a few ms a photo.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from phi3v_dist.data.importers.catalogue.garments import COLOURS, GARMENTS, Colour, Curve, Garment, Look, Point
from phi3v_dist.data.importers.catalogue.plan import random_look

SUPERSAMPLING = 2
GOLD, GOLD_EDGE = (228, 178, 56), (84, 56, 12)
RIBBON, RIBBON_EDGE = (72, 214, 208), (12, 62, 70)  # turquoise: no cloth and no ink has it
BACKGROUNDS: tuple[Colour, ...] = (
    (250, 248, 244), (232, 240, 248), (250, 238, 226), (230, 244, 232), (246, 234, 246), (226, 228, 232),
)  # fmt: skip


@dataclass(frozen=True)
class View:
    """Where the camera stands: garment coordinates → pixels of the drawing, p ↦ matrix · p + centre."""

    matrix: Float[np.ndarray, "2 2"]
    centre: Float[np.ndarray, " 2"]

    @classmethod
    def random(cls, rng: np.random.Generator, width: int, height: int) -> "View":
        """Turned by up to 8 degrees, sheared, narrowed (seen from the side), mirrored half of the time, moved."""
        angle, shear = rng.uniform(-0.14, 0.14), rng.uniform(-0.08, 0.08)
        half_side = 0.5 * min(width, height) * rng.uniform(0.82, 0.95)
        narrowed = rng.uniform(0.88, 1.0) * rng.choice((-1.0, 1.0))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = half_side * turn @ np.array([[narrowed, shear], [0.0, 1.0]])
        return cls(matrix, np.array([width, height]) * rng.uniform(0.47, 0.53, size=2))


class Pen:
    """Draws garment coordinates on a picture, seen through a view; widths and radii are in garment units too."""

    def __init__(self, image: Image.Image, view: View):
        self.draw, self.view = ImageDraw.Draw(image), view
        self.scale = float(np.sqrt(abs(np.linalg.det(view.matrix))))

    def points(self, curve: Curve) -> list[Point]:
        """Pixels of the curve's points."""
        return [(x, y) for x, y in (curve @ self.view.matrix.T + self.view.centre).tolist()]

    def fill(self, curve: Curve, colour: Colour | int) -> None:
        self.draw.polygon(self.points(curve), fill=colour)

    def stroke(self, curve: Curve, colour: Colour | int, width: float) -> None:
        joint = "curve" if width > 0.05 else None  # a thin line's gaps at its bends cannot be seen, and filling costs
        self.draw.line(self.points(curve), fill=colour, width=max(1, round(width * self.scale)), joint=joint)

    def outline(self, curve: Curve, colour: Colour | int, width: float) -> None:
        self.stroke(np.concatenate([curve, curve[:2]]), colour, width)

    def solid(self, curve: Curve, colour: Colour) -> None:
        """Filled, with a darker edge."""
        self.fill(curve, colour)
        self.outline(curve, shade(colour, 0.6), 0.025)

    def disc(self, centre: Point, radius: float, colour: Colour | int) -> None:
        self.draw.circle(self.points(np.array([centre]))[0], radius * self.scale, fill=colour)


def shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, round(channel * factor)) for channel in colour)
    return red, green, blue


def mix(first: Colour, second: Colour) -> Colour:
    red, green, blue = ((a + b) // 2 for a, b in zip(first, second, strict=True))
    return red, green, blue


def draw_photo(look: Look, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """One photo, RGB, `width` x `height` px; the same generator state gives the same pixels."""
    canvas = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    garment, view = GARMENTS[look.category], View.random(rng, *canvas)
    fabric, ink = COLOURS[look.colour]
    fabric = shade(fabric, rng.uniform(0.93, 1.05))
    mask = fabric_mask(garment, view, canvas)
    image = draw_background(mask, rng, width, height).resize(canvas, Image.Resampling.NEAREST)
    pen = Pen(image, view)
    for part in garment.behind:
        pen.solid(part, garment.stuff)
    for strap in garment.straps:
        pen.stroke(strap, garment.stuff, 0.12)
    box = mask.getbbox()
    assert box is not None, f"no cloth of {look} in the picture"
    image.paste(weave(look.pattern, fabric, ink, view, rng, canvas).crop(box), box, mask.crop(box))
    draw_details(pen, garment, shade(fabric, 0.55))
    if look.trim == "gold":
        for hem in garment.hems:
            pen.stroke(hem, GOLD_EDGE, 0.18)
            pen.stroke(hem, GOLD, 0.13)
    if look.trim == "bow":
        draw_bow(pen, garment.bow)
    draw_tag(pen, garment.tag, look.limited)
    return light_and_noise(image.reduce(SUPERSAMPLING), rng)


def draw_any_size(
    look: Look, rng: np.random.Generator, side_px: tuple[int, int], aspect_ratio: tuple[float, float]
) -> Image.Image:
    """A photo of random size and shape: its longer side and its width / height within these limits."""
    low, high = np.log(aspect_ratio)
    side, ratio = rng.integers(side_px[0], side_px[1] + 1), np.exp(rng.uniform(low, high))
    return draw_photo(look, rng, width=round(side * min(1, ratio)), height=round(side / max(1, ratio)))


def fabric_mask(garment: Garment, view: View, canvas: tuple[int, int]) -> Image.Image:
    """255 where cloth is, 0 elsewhere."""
    mask = Image.new("L", canvas)
    pen = Pen(mask, view)
    for outline in garment.fabric:
        pen.fill(outline, 255)
    for outline in garment.openings:
        pen.fill(outline, 0)
    return mask


def draw_background(mask: Image.Image, rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A pale wall, half of the time with a floor, and the product's soft shadow (blurred small: it has no detail)."""
    wall = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    image = Image.new("RGB", (width, height), wall)
    if rng.random() < 0.5:
        horizon = height * rng.uniform(0.66, 0.86)
        ImageDraw.Draw(image).rectangle((0, horizon, width, height), fill=shade(wall, rng.uniform(0.88, 0.95)))
    small = mask.reduce(8).point([round(0.4 * value) for value in range(256)])
    soft = small.filter(ImageFilter.GaussianBlur(small.width / 50)).resize((width, height), Image.Resampling.BILINEAR)
    side, down = rng.uniform(-0.03, 0.03) * width, rng.uniform(-0.01, 0.05) * height
    image.paste((70, 66, 80), (round(side), round(down)), soft)
    return image


def weave(
    pattern: str, fabric: Colour, ink: Colour, view: View, rng: np.random.Generator, canvas: tuple[int, int]
) -> Image.Image:
    """A whole canvas of cloth, its pattern lying along the garment's axes."""
    cloth = Image.new("RGB", canvas, fabric)
    pen = Pen(cloth, view)
    period = rng.uniform(0.25, 0.31)
    grid = np.arange(-1.3 + rng.uniform(0, period), 1.4, period)
    if pattern == "stripes":
        for y in grid:
            pen.fill(band(y, 0.4 * period), ink)
    if pattern == "check":
        half_ink, width = mix(fabric, ink), 0.45 * period
        for position in grid:
            pen.fill(band(position, width), half_ink)
            pen.fill(band(position, width)[:, ::-1], half_ink)
        for x in grid:
            for y in grid:
                pen.fill(np.array([(x, y), (x + width, y), (x + width, y + width), (x, y + width)]), ink)
    if pattern == "dots":
        for row, y in enumerate(grid):
            for x in grid + row % 2 * period / 2:
                pen.disc((x, y), 0.27 * period, ink)
    return cloth


def band(y: float, width: float) -> Curve:
    """A horizontal stripe right across a garment."""
    return np.array([(-1.6, y), (1.6, y), (1.6, y + width), (-1.6, y + width)])


def draw_details(pen: Pen, garment: Garment, dark: Colour) -> None:
    """Edges and seams of the cloth, and what is on it."""
    for outline in (*garment.fabric, *garment.openings):
        pen.outline(outline, dark, 0.03)
    for seam in garment.seams:
        pen.stroke(seam, dark, 0.022)
    for part in garment.front:
        pen.solid(part, garment.stuff)
    for button in garment.buttons:
        pen.disc(button, 0.065, shade(garment.stuff, 0.5))
        pen.disc(button, 0.045, garment.stuff)


def draw_bow(pen: Pen, centre: Point) -> None:
    """A turquoise ribbon tied in a bow."""
    loop = np.array([(0, 0), (0.34, -0.22), (0.4, 0.0), (0.34, 0.2)])
    tail = np.array([(0, 0), (0.26, 0.4), (0.08, 0.44), (0, 0.1)])
    for part in (tail, tail * (-1, 1), loop, loop * (-1, 1)):
        pen.fill(part + centre, RIBBON)
        pen.outline(part + centre, RIBBON_EDGE, 0.028)
    pen.disc(centre, 0.09, RIBBON_EDGE)
    pen.disc(centre, 0.065, RIBBON)


def draw_tag(pen: Pen, knot: Point, limited: bool) -> None:
    """The hang tag on its string: black for a limited edition, white otherwise."""
    paper, print_colour = ((24, 22, 26), (236, 236, 240)) if limited else ((255, 255, 255), (150, 150, 156))
    card = np.array([(-0.09, 0.1), (0.0, 0.02), (0.09, 0.1), (0.17, 0.14), (0.17, 0.52), (-0.17, 0.52), (-0.17, 0.14)])
    pen.stroke(np.array([(-0.1, -0.16), (0.0, 0.08)]) + knot, (110, 104, 100), 0.014)
    pen.fill(card + knot, paper)
    pen.outline(card + knot, print_colour, 0.02)
    for y in (0.24, 0.33, 0.42):
        pen.stroke(np.array([(-0.1, y), (0.1, y)]) + knot, print_colour, 0.03)


def light_and_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The light's strength and colour, corners that get less of it, and the noise of a sensor."""
    tint = rng.uniform(0.94, 1.0) * rng.uniform(0.96, 1.0, size=3)
    corners = rng.uniform(0.9, 1.0, size=(2, 2, 1)) * tint
    light = Image.fromarray((255 * corners).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    grain = rng.standard_normal(image.size[::-1], dtype=np.float32) * rng.uniform(2, 6)
    pixels = np.asarray(ImageChops.multiply(image, light), dtype=np.int16) + grain.astype(np.int16)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def contact_sheet(num: int = 40, seed: int = 0, side: int = 168) -> Image.Image:
    """`num` photos of random looks in rows, one category a column, for the README and for whoever changes a drawing."""
    rng = np.random.default_rng(seed)
    columns = len(GARMENTS)
    sheet = Image.new("RGB", (columns * side, -(-num // columns) * side), "white")
    for index in range(num):
        look = random_look(rng, list(GARMENTS)[index % columns])
        photo = draw_photo(look, rng, 2 * side, 2 * side).reduce(2)
        sheet.paste(photo, (index % columns * side, index // columns * side))
    return sheet
