"""Picture files → upright 8-bit RGB; and the same picture's size from its header alone.

What comes in: the bytes of a JPEG, PNG, WebP, … What goes out: pixels, or (width, height). Surprise: pictures are
repaired *here* (EXIF turned, 16-bit scaled, alpha laid on white, CMYK converted), because the processor must stay
exactly as upstream, which does none of it. The plan counts tokens by the header, so the two must never disagree.
"""

import io
import struct

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no EPS: Pillow would start Ghostscript
ALPHA_BACKGROUND = (255, 255, 255)
EXIF_ORIENTATION = 0x0112
EXIF_FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}  # codes of cv2.flip; 5 to 8 are transposed before
PNG_EXIF_MARKS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")

# What Pillow raises on damaged files, by experience; only the first two are documented.
PICTURE_ERRORS = (
    OSError, Image.DecompressionBombError, ValueError, SyntaxError, EOFError, struct.error, TypeError, LookupError,
    ArithmeticError, AttributeError, MemoryError,
)  # fmt: skip


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) that `decode_image` will give, from the file's header alone. Raises one of PICTURE_ERRORS."""
    with _open(data) as file:
        width, height = file.size
        return (height, width) if _orientation(file, data) >= 5 else (width, height)


def decode_image(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Picture file → upright 8-bit RGB. Raises one of PICTURE_ERRORS when it is not whole."""
    with _open(data) as file:
        orientation = _orientation(file, data)
        if file.format == "JPEG" and file.mode in ("L", "RGB"):
            pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        else:
            pixels = _rgb(file)
    if orientation >= 5:  # as phones hold most photos; numpy would take twice as long over this as over the decoding
        pixels = cv2.transpose(pixels)
    if orientation in EXIF_FLIPS:
        pixels = cv2.flip(pixels, EXIF_FLIPS[orientation])
    return np.ascontiguousarray(pixels)


def _open(data: bytes) -> Image.Image:
    Image.init()  # registers the formats, once
    try:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"its {len(data)} bytes begin with {data[:8]!r}, as no picture does") from None


def _orientation(file: Image.Image, data: bytes) -> int:
    """The EXIF orientation, 1 (upright) to 8; also 1 when it cannot be read."""
    if file.format == "TIFF":
        return 1  # Pillow turns these by itself
    if file.format == "PNG" and not any(mark in data for mark in PNG_EXIF_MARKS):
        return 1  # Pillow would decode the whole picture to find out
    try:
        orientation = file.getexif().get(EXIF_ORIENTATION, 1)
    except PICTURE_ERRORS:
        return 1
    return int(orientation) if orientation in range(1, 9) else 1


def _rgb(picture: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    picture.load()
    if picture.mode.startswith("I"):  # 16-bit grey; upstream clips at 255, which leaves nearly all white
        return np.repeat((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        background = Image.new("RGBA", picture.size, ALPHA_BACKGROUND)
        picture = Image.alpha_composite(background, picture)
    return np.asarray(picture.convert("RGB"))
