"""Picture files → upright 8-bit RGB; and the same picture's size from its header alone.

What comes in: the bytes of a JPEG, PNG, WebP, … What goes out: pixels, or (width, height). Surprise: pictures are
repaired *here* (EXIF turned, 16-bit scaled, alpha laid on white, CMYK converted), because the processor must stay
exactly as upstream, which does none of it. The plan counts tokens by the header, so the two must never disagree.

What is refused: pictures that are not whole, that would need more memory than `MAX_PIXELS` allows (found from the
header), and pixels without a known range (floating point, 32 bits). Of animations the first frame is taken.

JPEG decoders warn of damage and of harmless oddities alike, and then fill up with grey. Harmless, by trial on files
cut, flipped and padded at every place: bytes between the segments of the header, nonsense in the segments that say
nothing of pixels, up to `SPARE_BYTES` between the last pixel and the end mark. All else that is warned of is damage.
"""

import io
import re
import struct
import warnings

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageFile, UnidentifiedImageError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no EPS: Pillow would start Ghostscript
ALPHA_BACKGROUND = (255, 255, 255)

# Decoding one picture may take about 0.9 GB: JPEGs need 3 bytes a pixel, progressive ones 6, what Pillow decodes 6 to
# 26 (measured). Photos of 108 MP and A4 pages of 600 dpi are let in; no crop is ever cut from more than 7 MP.
MAX_JPEG_PIXELS = 1 << 27
MAX_PIXELS = 36_000_000

SPARE_BYTES = 8  # writers pad to a word; where bits flipped, usually more is left over
EXIF_ORIENTATION = 0x0112
EXIF_FLIPS = {2: (1,), 3: (0, 1), 4: (0,), 6: (0,), 7: (0, 1), 8: (1,)}  # axes; 5 to 8 are transposed afterwards
PNG_EXIF_MARKS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")

# What Pillow raises on damaged files, by experience; only the first two are documented.
PICTURE_ERRORS = (
    OSError, Image.DecompressionBombError, ValueError, SyntaxError, EOFError, struct.error, TypeError, LookupError,
    ArithmeticError, AttributeError, MemoryError,
)  # fmt: skip


_SPARE = re.compile(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9")
_KEPT_SEGMENTS = {0xC4, 0xDB, 0xDD, 0xEE, *range(0xC0, 0xC4)}  # tables, size, restart interval, Adobe's colour space

# Its limits are not ours, and there is nothing that whoever reads the log could do about the warning.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) that `decode_image` will give, from the file's header alone. Raises one of PICTURE_ERRORS."""
    with _open(data) as file:
        width, height = file.size
        return (height, width) if _orientation(file, data) >= 5 else (width, height)


def decode_image(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Picture file → upright 8-bit RGB. Raises one of PICTURE_ERRORS when it is not whole.

    A picture that EXIF lays on its side is returned as a transposed view of its array: crops are cut from it as fast as
    from any other, while a copy would take more than half as long as the decoding.
    """
    with _open(data) as file:
        orientation = _orientation(file, data)
        pixels = _decode_jpeg(data) if _is_plain_jpeg(file) else _rgb(file)
    pixels = np.require(pixels, requirements=["C", "W"])  # Pillow's arrays are read-only, which torch warns of
    if orientation in EXIF_FLIPS:
        import torch  # takes seconds, and most commands of phi3v-prepare need no other part of it

        pixels = torch.from_numpy(pixels).flip(EXIF_FLIPS[orientation]).numpy()  # numpy takes 30 times as long
    return pixels.transpose(1, 0, 2) if orientation >= 5 else pixels  # as phones hold most photos


def _open(data: bytes) -> Image.Image:
    """The picture, of which only the header was read."""
    Image.init()  # registers the formats, once
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # other libraries switch it on for the whole process
    if not data:
        raise ValueError("the file is empty")
    try:
        file = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"its {len(data):,} bytes begin with {data[:8]!r}, as no picture does") from None
    except Image.DecompressionBombError:
        raise ValueError(f"it is larger than the {MAX_PIXELS:,} px allowed; shrink it") from None
    width, height = file.size
    limit = MAX_JPEG_PIXELS if _is_plain_jpeg(file) else MAX_PIXELS
    if width * height > limit:
        raise ValueError(f"{width:,} x {height:,} px are more than the {limit:,} allowed for {file.format}; shrink it")
    return file


def _is_plain_jpeg(file: Image.Image) -> bool:
    """Whether libjpeg-turbo makes RGB of it. (MPO: several JPEGs in one file, as phones store depth.)"""
    return file.format in ("JPEG", "MPO") and file.mode in ("L", "RGB")


def _decode_jpeg(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    try:
        return _decode_whole_jpeg(data)
    except ValueError:
        bare = _without_metadata(data)
        if bare == data:
            raise
    return _decode_whole_jpeg(bare)


def _decode_whole_jpeg(data: bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Stops at the first warning, so that one of the end mark says that all before it was well."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError as error:
        spare = _SPARE.fullmatch(str(error))
        if not spare or int(spare[1]) > SPARE_BYTES:
            raise
    return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=False)


def _without_metadata(data: bytes) -> bytes:
    """The JPEG with only those segments before its pixels that say something about them, and nothing between them."""
    kept, place = [data[:2]], 2
    while (place := data.find(b"\xff", place)) >= 0 and place + 4 <= len(data):
        marker = data[place + 1]
        if marker == 0xDA:  # the pixels
            return b"".join([*kept, data[place:]])
        if marker in (0x00, 0xFF) or 0xD0 <= marker <= 0xD9:  # no segment
            place += 1
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in _KEPT_SEGMENTS:
            kept.append(data[place:end])
        place = end
    return data


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
        grey = np.asarray(picture)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("its pixels are 32-bit numbers of no known range; store 8 or 16 bits")
        return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range; store 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, ALPHA_BACKGROUND), picture)
    return np.asarray(picture.convert("RGB"))
