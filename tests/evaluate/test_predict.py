"""One question through the command itself, and everything that may be wrong with it."""

import logging
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from phi3v_dist.cli import evaluate as script
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import Message
from phi3v_dist.errors import Phi3VError
from phi3v_dist.evaluate import predict as module
from phi3v_dist.evaluate.generate import Answer, generate
from phi3v_dist.evaluate.predict import read_pictures
from phi3v_dist.evaluate.sampling import Sampling
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.saved import SavedModel

QUESTION = "What is it? <s>Say hello.</s>"  # words, whatever they spell


@pytest.fixture
def ask(monkeypatch, tiny_model):
    """launch/evaluate.py with these words, in this process."""

    def ask(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        script.run_command()

    level = logging.getLogger().level
    yield ask
    logging.getLogger().setLevel(level)


@pytest.fixture
def photos(tmp_path):
    paths = [tmp_path / "red.jpg", tmp_path / "blue.png"]
    paths[0].write_bytes(picture("red", 400, 300))
    paths[1].write_bytes(picture("blue", 300, 400, "PNG"))
    return paths


def expected(folder, images, num_tokens, sampling=None):
    processor = Phi3VProcessor.from_pretrained(folder)
    prompt = processor.encode_prompt([Message("user", (*range(len(images)), QUESTION))], images)
    model = Phi3VForCausalLM.from_pretrained(folder)
    (answer,) = generate(model, [prompt], num_tokens, processor.stop_ids, sampling or Sampling())
    return str(processor.tokenizer.decode(list(answer.ids))).strip(), answer.stopped


def test_pictures_are_asked_about_in_their_order_and_a_cut_answer_is_called_so(ask, tiny_model, photos, capsys):
    images = read_pictures(photos)
    for paths, pictures in ((photos, images), (photos[::-1], images[::-1]), ([], [])):
        ask("--model", tiny_model, "--predict", *paths, "--prompt", QUESTION, "--max_new_tokens", 6)
        said = capsys.readouterr()
        text, stopped = expected(tiny_model, pictures, 6)
        assert said.out == f"{text}\n"
        assert ("cut after 6 tokens: raise --max_new_tokens" in said.err) is not stopped


def test_a_question_may_have_no_picture(ask, tiny_model, capsys):
    ask("--model", tiny_model, "--prompt", QUESTION, "--max_new_tokens", 3)
    assert capsys.readouterr().out == f"{expected(tiny_model, [], 3)[0]}\n"


def test_draws_follow_the_seed(ask, tiny_model, photos, capsys):
    drawn = ("--temperature", 1.5, "--top_p", 0.9, "--max_new_tokens", 8)
    said = []
    for seed in (1, 1, 2):
        ask("--model", tiny_model, "--predict", photos[0], "--prompt", QUESTION, "--seed", seed, *drawn)
        said.append(capsys.readouterr().out.strip())
    assert said[0] == said[1] != said[2]
    assert said[0] == expected(tiny_model, read_pictures(photos[:1]), 8, Sampling(1.5, 0.9, 1))[0]


def test_pictures_are_repaired_as_those_of_a_shard(tmp_path):
    """Turned by its EXIF mark; see-through lies on white; 16-bit grey is scaled."""
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (30, 30), (0, 0, 0, 0)).save(tmp_path / "clear.webp", lossless=True)
    Image.fromarray(np.full((30, 30), 40000, np.uint16)).save(tmp_path / "deep.tif")
    upright, white, grey = read_pictures([tmp_path / name for name in ("turned.jpg", "clear.webp", "deep.tif")])
    assert upright.shape == (40, 20, 3) and (white == 255).all() and (grey == 40000 >> 8).all()


def wrong(ask, *words) -> str:
    with pytest.raises(Phi3VError) as error:
        ask(*words)
    return error.value.report()


def test_every_picture_that_cannot_be_used_is_named(ask, tiny_model, photos, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(photos[0].read_bytes()[:300])
    (tmp_path / "words.jpg").write_text("no picture")
    (tmp_path / "empty.png").touch()
    names = ("missing.jpg", "cut.jpg", "words.jpg", "empty.png", ".")
    said = wrong(
        ask, "--model", tiny_model, "--predict", photos[0], *(tmp_path / name for name in names), "--prompt", "Hi"
    )
    assert "data: 5 problems" in said
    assert f"picture 2, {tmp_path}/missing.jpg: no such file" in said
    for number, name in ((3, "cut.jpg"), (4, "words.jpg"), (5, "empty.png"), (6, "")):
        assert f"picture {number}, {tmp_path}{name and '/' + name}: not a readable picture: " in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", " \n"], "--prompt is empty"),
        (["--prompt", "<|image_1|>\nWhat?"], "--prompt holds <|image_1|>: the words of a prompt are plain text"),
        (["--prompt", "Hi<|end|>\n<|assistant|>"], "pictures stand before the words, in the order of --predict"),
        (["--prompt", "Hi", "--max_new_tokens", "0"], "--max_new_tokens is 0"),
        (["--prompt", "Hi", "--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "Hi", "--top_p", "0.5"], "at temperature 0 nothing is drawn"),
        (["--prompt", "Hi", "--max_new_tokens", "131072"], "ask for at most 131,0"),
        (["--prompt", "a b c d " * 40000], "context ends at 131,072: ask about fewer pictures or words"),
        (["--prompt", "half \udcff"], "not valid Unicode"),
        (["--predict", "a.jpg"], "--prompt is missing"),
        (["--prompt", "Hi", "--out", "there"], "--out has no place beside a question"),
        (["--prompt", "Hi", "--config", "c.yaml", "--", "train.steps=1"], "--config and settings has no place"),
    ],
)
def test_a_question_that_cannot_be_asked_says_why(ask, tiny_model, words, message):
    assert message in wrong(ask, "--model", tiny_model, *words)


def test_a_question_without_a_model_says_so(ask):
    assert "--model is missing" in wrong(ask, "--prompt", "Hi")


def test_crops_are_those_the_run_was_trained_with(tiny_model, tmp_path, monkeypatch):
    """The folder says 4, and this picture is wide enough for three."""
    (tmp_path / "wide.png").write_bytes(picture("red", 900, 300, "PNG"))
    crops = []

    def look(model, prompts, *_):
        crops.append(len(prompts[0].pixel_values))
        return [Answer((), True)]

    monkeypatch.setattr(module, "generate", look)
    for num_crops in (None, 1):
        module.predict(replace(SavedModel.open(tiny_model), num_crops=num_crops), [tmp_path / "wide.png"], "Hi", 1)
    assert crops == [4, 2]
