"""Pictures that are damaged, enormous or odd: refused with a reason, or repaired by rule, never filled up."""

import io
import struct
import subprocess
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from phi3v_dist.data.crops import CropLayout
from phi3v_dist.data.pictures import MAX_PIXELS, PICTURE_ERRORS, decode_image, upright_size
from phi3v_dist.errors import DataError

COARSE = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
PHOTO = Image.fromarray(COARSE).resize((160, 120), Image.Resampling.BICUBIC)


def encode(picture: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


JPEGS = {
    "baseline": encode(PHOTO, "JPEG"),
    "progressive": encode(PHOTO, "JPEG", progressive=True),
    "grey": encode(PHOTO.convert("L"), "JPEG"),
    "restarts": encode(PHOTO, "JPEG", restart_marker_rows=1),
    "full colour": encode(PHOTO, "JPEG", quality=95, subsampling=0, optimize=True),
    "several in one": encode(PHOTO, "MPO", save_all=True, append_images=[PHOTO.rotate(180)]),
    "cmyk": encode(PHOTO.convert("CMYK"), "JPEG"),
}
OTHERS = {
    "PNG": encode(PHOTO, "PNG"), "WEBP": encode(PHOTO, "WEBP"), "GIF": encode(PHOTO, "GIF"),
    "BMP": encode(PHOTO, "BMP"), "TIFF": encode(PHOTO, "TIFF"),
    "TIFF/LZW": encode(PHOTO, "TIFF", compression="tiff_lzw"), "PPM": encode(PHOTO, "PPM"),
}  # fmt: skip


@pytest.mark.fault(64)
@pytest.mark.parametrize("name", sorted(JPEGS))
def test_a_jpeg_that_was_cut_anywhere_never_passes(name: str) -> None:
    whole = JPEGS[name]
    end = whole.index(b"\xff\xd9\xff\xd8") if name == "several in one" else len(whole) - 1  # its first picture's
    cuts = sorted({*range(0, end, 37), *range(end - 40, end)})
    passed = []
    for cut in cuts:
        try:
            decode_image(whole[:cut])
            passed.append(cut)
        except PICTURE_ERRORS:
            pass
    assert passed == []


@pytest.mark.fault(64)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", sorted(OTHERS))
@pytest.mark.parametrize("library_allows_it", [False, True])
def test_another_picture_that_was_cut_is_refused_or_has_all_its_pixels(name: str, library_allows_it: bool) -> None:
    whole = OTHERS[name]
    pixels = decode_image(whole)
    refused = 0
    for cut in range(0, len(whole), max(1, len(whole) // 50)):
        ImageFile.LOAD_TRUNCATED_IMAGES = library_allows_it  # as some libraries leave it
        try:
            assert np.array_equal(decode_image(whole[:cut]), pixels)
        except PICTURE_ERRORS:
            refused += 1
    assert refused >= 48


HARMLESS = {
    "bytes after the end": lambda d: d + b"trailing garbage" * 9,
    "zeros after the end": lambda d: d + bytes(512),
    "bytes between segments": lambda d: d[: d.index(b"\xff\xdb")] + b"\0\1\2" + d[d.index(b"\xff\xdb") :],
    "bytes before the pixels": lambda d: d[: d.index(b"\xff\xda")] + b"\0\1\2" + d[d.index(b"\xff\xda") :],
    "padding before the end mark": lambda d: d[:-2] + bytes(4) + d[-2:],
    "fill before the end mark": lambda d: d[:-2] + b"\xff\xff" + d[-2:],
    "unknown JFIF version": lambda d: d.replace(b"JFIF\0\1", b"JFIF\0\7", 1),
    "broken colour profile": lambda d: d[:2] + segment(0xE2, b"ICC_PROFILE\0\2\x09" + b"x" * 20) + d[2:],
}


@pytest.mark.fault(64)
@pytest.mark.parametrize("name", ["baseline", "progressive", "grey", "restarts", "full colour"])
@pytest.mark.parametrize("oddity", HARMLESS)
def test_an_odd_but_whole_jpeg_gives_the_pixels_of_the_plain_one(name: str, oddity: str) -> None:
    odd = HARMLESS[oddity](JPEGS[name])
    assert odd != JPEGS[name]
    assert np.array_equal(decode_image(odd), decode_image(JPEGS[name]))
    assert upright_size(odd) == PHOTO.size
    with pytest.raises(PICTURE_ERRORS):
        decode_image(odd[: odd.rindex(b"\xff\xd9") - 300])


@pytest.mark.fault(64)
def test_an_end_mark_after_the_cut_does_not_make_a_jpeg_whole() -> None:
    for name in ("baseline", "grey", "restarts", "full colour"):
        for cut in range(700, len(JPEGS[name]) - 50, 101):
            with pytest.raises(PICTURE_ERRORS):
                decode_image(JPEGS[name][:cut] + b"\xff\xd9")


def one_bit_png(side_px: int) -> bytes:
    """A white square of one bit a pixel: a few kB, whatever its side."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * ((side_px + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(side_px)) + packer.flush()
    header = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.fault(66)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side_px", [9_400, 12_000, 14_000])
def test_a_decompression_bomb_is_refused_from_its_header(side_px: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def decoded(_: Any) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    bomb = one_bit_png(side_px)
    assert len(bomb) < side_px**2 / 1000
    for look in (upright_size, decode_image):
        with pytest.raises(ValueError, match=r"(more|larger) than the 36,000,000 .*; shrink it"):
            look(bomb)


@pytest.mark.fault(66)
def test_the_header_of_a_jpeg_decides_too_and_large_scans_are_let_in() -> None:
    huge = bytearray(JPEGS["baseline"])
    place = huge.index(b"\xff\xc0") + 5
    huge[place : place + 4] = struct.pack(">HH", 20_000, 20_000)
    with pytest.raises(ValueError, match="134,217,728 allowed for JPEG|larger than"):
        upright_size(bytes(huge))
    a4_at_600_dpi = (4960, 7016)
    assert a4_at_600_dpi[0] * a4_at_600_dpi[1] < MAX_PIXELS
    assert upright_size(encode(Image.new("1", a4_at_600_dpi), "PNG")) == a4_at_600_dpi


@pytest.mark.fault(67)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_dot_is_used_and_a_hair_is_refused_by_its_name(file_format: str) -> None:
    dot = encode(Image.new("RGB", (1, 1), "red"), file_format)
    assert decode_image(dot).shape == (1, 1, 3)
    assert CropLayout.of(*upright_size(dot), 16).num_crops == 17
    for size_wh in ((30_000, 1), (1, 30_000)):
        hair = encode(Image.new("RGB", size_wh, "red"), file_format)
        assert decode_image(hair).shape == (size_wh[1], size_wh[0], 3)
        with pytest.raises(DataError, match=rf"{size_wh[0]} x {size_wh[1]} px cannot be cut .* trim the picture"):
            CropLayout.of(*upright_size(hair), 16)


@pytest.mark.fault(69)
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bits_are_scaled_and_pixels_of_no_known_range_refused(file_format: str) -> None:
    grey = Image.fromarray(np.full((4, 5), 20_000, np.uint16))
    assert set(decode_image(encode(grey, file_format)).flat) == {78}  # 20000 / 256, not 255
    for picture in (Image.new("F", (5, 4), 0.5), Image.new("I", (5, 4), 70_000)):
        with pytest.raises(ValueError, match="no known range; store 8 or 16 bits"):
            decode_image(encode(picture, "TIFF"))


@pytest.mark.fault(70)
def test_a_colour_hidden_under_full_transparency_is_never_seen() -> None:
    hidden = encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG")
    assert set(decode_image(hidden).flat) == {255}


@pytest.mark.fault(73)
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "begin with b'<svg xml', as no picture does"),
        (b"<!DOCTYPE html><html>404</html>", "begin with b'<!DOCTYP', as no picture does"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n", "as no picture does"),
        (b"%PDF-1.7\n", "as no picture does"),
        (bytes(100), "as no picture does"),
    ],
)
def test_what_is_no_picture_is_refused_and_no_program_is_started(
    data: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    for look in (upright_size, decode_image):
        with pytest.raises(ValueError) as error:
            look(data)
        assert reason in str(error.value)
