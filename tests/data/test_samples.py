"""Bytes of a sample → a conversation and upright pictures, or one reason why not."""

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from phi3v_dist.config import SourceSettings
from phi3v_dist.data.pictures import PICTURE_ERRORS, decode_image, upright_size
from phi3v_dist.data.samples import BadSample, Message, decode_sample, read_messages

PLAIN = SourceSettings(shards=["a.tar"])
IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def read(turns: Any, names: tuple[str, ...] = ()) -> tuple[Message, ...]:
    return read_messages({"json": json.dumps({"messages": turns}).encode()}, names, PLAIN)


def shown(content: Any, *names: str) -> tuple[str | int, ...]:
    """Parts of a user turn of this content, in a sample that has these pictures."""
    return read([{"role": "user", "content": content}], names)[0].parts


def test_a_turn_is_a_string_or_a_list_of_parts_in_reading_order() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [text("Is "), {"type": "image", "image": "b.png"}, text(" like "), IMAGE, text("?")],
        },
        {"role": "assistant", "content": "No <|end|>"},
    ]
    assert read(turns, ("a.png", "b.png", "c.png")) == (
        Message("system", ("Be brief.",)),
        Message("user", (0, "Is ", 1, " like ", 2, "?")),
        Message("assistant", ("No <|end|>",)),
    )


def test_pictures_are_shown_by_name_or_one_after_another() -> None:
    assert shown([IMAGE, text("x"), IMAGE], "0.jpg", "1.jpg") == (0, "x", 1)
    assert shown([IMAGE | {"image": "1.jpg"}, IMAGE | {"image": "0.JPG"}], "0.jpg", "1.jpg") == (1, 0)
    assert shown([IMAGE | {"image": None}, text("x")], "0.jpg") == (0, "x")


def test_pictures_that_no_part_shows_come_first_in_the_first_user_turn() -> None:
    turns = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    assert [message.parts for message in read(turns, ("0.jpg", "1.jpg"))][:2] == [("system",), (0, 1, "user")]
    assert shown([text("x"), IMAGE | {"image": "1.jpg"}], "0.jpg", "1.jpg", "2.jpg") == (0, 2, "x", 1)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ("hello", "`messages` is not a list of turns"),
        ([], "`messages` is not a list of turns"),
        (None, "`messages` is not a list of turns"),
        ([None], "a turn needs a role among system, user, assistant"),
        ([{"role": "human", "content": "x"}], "a turn needs a role among .*human"),
        ([{"role": ["user"], "content": "x"}], "a turn needs a role"),
        ([{"role": "user"}], "the content of a turn is neither text nor a list"),
        ([{"role": "user", "content": None}], "the content of a turn is neither text nor a list"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "the content of a turn is neither"),
        ([{"role": "user", "content": 7}], "the content of a turn is neither"),
        ([{"role": "user", "content": ["bare words"]}], "a part of a turn is not an object .*bare words"),
        ([{"role": "user", "content": [None]}], "a part of a turn is not an object .*None"),
        ([{"role": "user", "content": [{"type": "video"}]}], "neither text nor image: .*video"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "neither text nor image"),
        ([{"role": "user", "content": [IMAGE, IMAGE, IMAGE]}], "shows one more picture; the sample has: 0.jpg, 1.jpg"),
        ([{"role": "user", "content": [IMAGE | {"image": "9.jpg"}]}], "shows picture '9.jpg'; the sample has: 0.jpg"),
        ([{"role": "user", "content": [IMAGE | {"image": ["0.jpg"]}]}], "shows picture .* the sample has"),
        ([{"role": "user", "content": [IMAGE | {"image": "0.jpg"}] * 2}], "a picture is used twice"),
        ([{"role": "assistant", "content": "x"}], "there are pictures but no user turn"),
    ],
)  # fmt: skip
@pytest.mark.fault(75)
@pytest.mark.fault(79)
def test_a_conversation_that_makes_no_sense_gives_a_reason(turns: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(turns, ("0.jpg", "1.jpg"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "its JSON cannot be read: Expecting value"),
        (b'{"messages": [', "its JSON cannot be read"),
        (b'{"title": "caf\xe9"}', "its JSON cannot be read: 'utf-8' codec"),
        (b"[" * 100_000, "its JSON cannot be read: maximum recursion"),
        (b'{"price": ' + b"9" * 5000 + b"}", "its JSON cannot be read: Exceeds the limit"),
        (b"[1, 2]", "its JSON is a list, not an object"),
        (b"null", "its JSON is a NoneType, not an object"),
        (b"{}", r"it has no .json and no .txt with words \(members: json\)"),
        (b'{"title": 1, "price": 2}', r"no `messages`, .* \(fields found: price, title\)"),
    ],
)
@pytest.mark.fault(74)
def test_json_that_cannot_be_used_gives_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_messages({"json": data}, (), PLAIN)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "image"]), inner, max_size=4)
    ),
    max_leaves=8,
)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": JSON_VALUES})


@settings(deadline=None)
@given(st.lists(TURN | JSON_VALUES, max_size=3))
@pytest.mark.fault(75)
def test_whatever_the_turns_are_the_answer_is_messages_or_a_reason(turns: list[Any]) -> None:
    try:
        messages = read(turns, ("0.jpg",))
    except ValueError as error:
        assert str(error)
    else:
        assert [part for message in messages for part in message.parts if isinstance(part, int)] == [0]


def from_fields(fields: dict[str, Any], **templates: str) -> tuple[Message, ...]:
    source = SourceSettings(shards=["a.tar"], **templates)
    return read_messages({"json": json.dumps(fields).encode()}, ("jpg",), source)


def test_templates_make_turns_of_a_records_fields() -> None:
    fields = {"title": "Cap <|end|>", "price": 12.5}
    templates = {"system": "Sell.", "prompt": "What is it?", "answer": "{{ title }}: {{ '%.2f' % price }}"}
    assert from_fields(fields, **templates) == (
        Message("system", ("Sell.",)),
        Message("user", (0, "What is it?")),
        Message("assistant", ("Cap <|end|>: 12.50",)),
    )
    assert from_fields(fields, prompt="", answer="{{ price }}")[0] == Message("user", (0,))


@pytest.mark.fault(74)
def test_a_text_file_is_the_field_text() -> None:
    source = SourceSettings(shards=["a.tar"], prompt="?", answer="{{ text }}")
    messages = read_messages({"txt": "\ufeffune légende\n".encode()}, (), source)
    assert messages[1] == Message("assistant", ("une légende",))
    with pytest.raises(ValueError, match="utf-8"):
        read_messages({"txt": b"caf\xe9"}, (), source)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ titel }}", r"'titel' is undefined \(fields: brand, price, title\)"),
        ("{{ title.en }}", "has no attribute 'en'"),
        ("{{ title }", r"template '{{ title }': unexpected '}'"),
        ("{% for x in title %}", "Unexpected end of template"),
        ("{{ title + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__ }}", "access to attribute '__class__' .* is unsafe"),
        ("{{ brand }}", "a value it shows is null"),
    ],
)
@pytest.mark.fault(75)
def test_a_template_that_cannot_be_filled_gives_a_reason(template: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        from_fields({"title": "Cap", "price": 3, "brand": None}, prompt="?", answer=template)
    assert from_fields({"brand": None}, prompt="?", answer="{{ brand or 'none' }}")[1].parts == ("none",)


@pytest.mark.fault(75)
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"brand": 1, "price": None}, r"null, which would be written as None.* \(null: price; fields: brand, price\)"),
        ({"price": float("nan")}, r"null, .*\(null: price; fields: price\)"),
        ({"price": ["9", "8"]}, r"a value it shows is a list; .* tojson"),
        ({"price": {"EUR": 9}}, r"a value it shows is an object; name a part of it"),
        ({"price": ""}, r"template '{{ price }}' gives an empty answer \(empty: price; fields: price\)"),
        ({"price": " \n"}, "empty: price"),
        ({"Price": 3}, r"'price' is undefined \(fields: Price\)"),
    ],
)
def test_a_field_that_is_null_empty_or_of_another_kind_is_named(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        from_fields(fields, prompt="?", answer="{{ price }}")


@pytest.mark.fault(74)
def test_nan_is_null_as_pandas_means_it_and_an_endless_number_is_none() -> None:
    assert from_fields({"price": float("nan")}, prompt="?", answer="{{ price or 'unknown' }}")[1].parts == ("unknown",)
    source = SourceSettings(shards=["a.tar"], prompt="?", answer="{{ price }}")
    with pytest.raises(ValueError, match="inf, which is no number"):
        read_messages({"json": b'{"price": 1e999}'}, (), source)


@pytest.mark.fault(76)
@pytest.mark.parametrize("answer", ["", " \n\t", [], [{"type": "text", "text": ""}], [{"type": "image"}]])
def test_answers_without_a_word_leave_nothing_to_learn(answer: Any) -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": answer}]
    with pytest.raises(ValueError, match="no assistant turn has words, so there is nothing to learn"):
        read(turns, ("0.jpg",))
    turns += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "A cat."}]
    assert read(turns, ("0.jpg",))[-1].parts == ("A cat.",)


def test_a_system_template_is_put_before_messages_that_have_none() -> None:
    source = SourceSettings(shards=["a.tar"], system="Sell {{ shop }}.")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]

    def roles_of(messages: list[dict[str, str]]) -> list[tuple[str, str | int]]:
        record = {"messages": messages, "shop": "caps"}
        read_back = read_messages({"json": json.dumps(record).encode()}, (), source)
        return [(message.role, message.parts[0]) for message in read_back]

    assert roles_of(turns) == [("system", "Sell caps."), ("user", "?"), ("assistant", "!")]
    assert roles_of([{"role": "system", "content": "Own."}, *turns])[0] == ("system", "Own.")
    with pytest.raises(ValueError, match="no `messages`, and the source names no `prompt` and `answer`"):
        read_messages({"json": b'{"shop": "caps"}'}, (), source)


def test_pictures_are_shown_as_openai_writes_it_too_but_nothing_is_fetched() -> None:
    def url(address: Any) -> dict[str, Any]:
        return {"type": "image_url", "image_url": address}

    assert shown([url({"url": "1.jpg"}), text("x"), url("0.JPG")], "0.jpg", "1.jpg") == (1, "x", 0)
    for address in ("https://example.com/cat.jpg", "data:image/jpeg;base64,AAAA", "file:///etc/passwd"):
        with pytest.raises(ValueError, match="not in the shard: nothing is fetched in training.*prepare.py import"):
            shown([url({"url": address})], "0.jpg")
    for nonsense in (None, 7, {}, {"url": None}, {"url": "2.jpg"}):
        with pytest.raises(ValueError, match="a turn shows .*; the sample has: 0.jpg"):
            shown([url(nonsense)], "0.jpg")


PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)  # 9 wide, 6 high
PICTURE = Image.fromarray(PIXELS)


def encode(picture: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def exif(orientation: Any) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.fault(72)
def test_pictures_are_turned_upright(file_format: str, orientation: int) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encode(PICTURE, file_format, exif=exif(orientation), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(decode_image(data), expected)
    assert upright_size(data) == (expected.shape[1], expected.shape[0])
    assert expected.shape[:2] == ((9, 6) if 5 <= orientation <= 8 else (6, 9))


ORIENTATION_IN_LETTERS = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x02" + b"6\0\0\0" + bytes(4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tags", [b"", b"no TIFF header", b"MM\0*\0\0\0\x08\xff\xff", ORIENTATION_IN_LETTERS])
def test_exif_that_is_nonsense_turns_nothing(tags: bytes) -> None:
    for file_format in ("JPEG", "PNG", "WEBP"):
        wrong = encode(PICTURE, file_format, exif=b"Exif\0\0" + tags)
        assert (upright_size(wrong), decode_image(wrong).shape) == ((9, 6), (6, 9, 3))


@pytest.mark.fault(69)
def test_16_bit_grey_is_scaled_to_8() -> None:
    grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for file_format in ("PNG", "TIFF"):
        assert decode_image(encode(Image.fromarray(grey), file_format))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.fault(70)
def test_what_is_transparent_becomes_white() -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 128]]], np.uint8)
    on_white = decode_image(encode(Image.fromarray(rgba)))[0]
    assert on_white[:2].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert np.abs(on_white[2].astype(int) - [132, 137, 142]).max() <= 1
    grey = np.array([[[10, 255], [10, 0]]], np.uint8)
    assert decode_image(encode(Image.fromarray(grey, "LA")))[0].tolist() == [[10, 10, 10], [255, 255, 255]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    assert decode_image(encode(palette, transparency=1))[0].tolist() == [[1, 2, 3], [255, 255, 255]]
    assert decode_image(encode(palette, "GIF", transparency=1))[0].tolist() == [[1, 2, 3], [255, 255, 255]]


@pytest.mark.fault(68)
@pytest.mark.fault(71)
def test_other_kinds_of_picture_keep_their_colours() -> None:
    flat = Image.new("RGB", (9, 6), (200, 60, 30))
    cmyk = decode_image(encode(flat.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - (200, 60, 30)).max() <= 8
    bits = Image.fromarray(np.array([[0, 255, 255]], np.uint8)).convert("1")
    assert decode_image(encode(bits))[0].tolist() == [[0] * 3, [255] * 3, [255] * 3]
    first, second = Image.new("RGB", (9, 6), "red"), Image.new("RGB", (9, 6), "blue")
    animated = encode(first, "GIF", save_all=True, append_images=[second])
    assert decode_image(animated)[0, 0].tolist() == [255, 0, 0]


MODES = {
    "JPEG": ["1", "L", "RGB", "CMYK"], "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "TIFF": ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"], "WEBP": ["RGB", "RGBA"],
    "GIF": ["1", "L", "P", "RGB"], "BMP": ["1", "L", "P", "RGB", "RGBA"], "PPM": ["1", "L", "RGB", "I;16"],
}  # fmt: skip


@pytest.mark.parametrize(("file_format", "mode"), [(name, mode) for name, modes in MODES.items() for mode in modes])
def test_the_header_tells_the_size_of_the_decoded_picture(file_format: str, mode: str) -> None:
    picture = Image.new("I;16", (9, 6), 4000) if mode == "I;16" else PICTURE.convert(mode)
    data = encode(picture, file_format, exif=exif(6))
    width, height = upright_size(data)
    pixels = decode_image(data)
    assert pixels.shape == (height, width, 3) and pixels.dtype == np.uint8
    assert any(array.flags.c_contiguous and array.flags.writeable for array in (pixels, pixels.transpose(1, 0, 2)))


WHOLE = {name: encode(PICTURE, name, exif=exif(6)) for name in ("JPEG", "PNG", "GIF", "WEBP", "TIFF")}


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_a_damaged_picture_raises_what_the_caller_expects_or_decodes_to_its_size(
    name: str, draw: st.DataObject
) -> None:
    data = bytearray(WHOLE[name])
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, min(len(data) - 1, 400)))] = draw.draw(st.integers(0, 255))
    damaged = bytes(data[: draw.draw(st.integers(0, len(data)))])
    try:
        width, height = upright_size(damaged)
        if width * height < 1e6:
            assert decode_image(damaged).shape == (height, width, 3)
    except PICTURE_ERRORS:
        pass


@pytest.mark.parametrize("name", ["JPEG", "PNG"])
@pytest.mark.parametrize("left_frac", [0.0, 0.3, 0.9])
@pytest.mark.fault(64)
def test_a_picture_that_is_cut_off_makes_a_bad_sample_that_names_it(name: str, left_frac: float) -> None:
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(large, name)
    parts = {"json": b'{"messages": [{"role": "user", "content": "?"}]}', "a.jpg": encode(large, "JPEG")}
    parts["b.jpg"] = data[: int(left_frac * len(data))]
    with pytest.raises(BadSample, match=r"x\.tar: sample 'key': b\.jpg is not a readable picture: .+") as error:
        decode_sample(3, "x.tar", "key", "source", PLAIN, parts, ["a.jpg", "b.jpg"])
    assert (error.value.shard, error.value.key) == ("x.tar", "key")
    sample = decode_sample(3, "x.tar", "key", "source", PLAIN, parts | {"b.jpg": data}, ["a.jpg", "b.jpg"])
    assert [image.shape for image in sample.images] == [(64, 64, 3)] * 2
