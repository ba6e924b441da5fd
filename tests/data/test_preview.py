"""The label preview shows what will be trained, on a terminal and on paper, and only that."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, environment, picture
from rich.console import Console
from webdataset import TarWriter

from phi3v_dist import config, run
from phi3v_dist.cli import check
from phi3v_dist.data.batch import Example
from phi3v_dist.data.preview import render, trained_share
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.data.samples import Message, Sample
from phi3v_dist.errors import ConfigError


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Phi3VProcessor:
    return Phi3VProcessor.from_pretrained(tiny_model, num_crops=2)


def encode(processor: Phi3VProcessor, *turns: tuple[str, tuple[str | int, ...]]) -> Example:
    image = np.zeros((300, 900, 3), np.uint8)
    return processor.encode(Sample(0, "a.tar", "0", "a", tuple(Message(*turn) for turn in turns), (image,)))


def test_trained_words_stand_in_brackets_template_and_pictures_are_marked(processor: Phi3VProcessor) -> None:
    example = encode(processor, ("system", ("Be.",)), ("user", (0, "What?")), ("assistant", ("A red\nsquare.",)))
    assert render(example, processor.tokenizer).plain == (
        "[<s>][<|system|>]\nBe.[<|end|>]\n[<|user|>]\n[image 1: 457 tokens, 672x336 px, 3 crops][<s>]What?[<|end|>]\n"
        "[<|assistant|>]⟦A red\nsquare.[<|end|>]⟧\n"
    )


def test_it_shows_the_labels_not_the_roles(processor: Phi3VProcessor) -> None:
    example = encode(processor, ("user", ("Say",)), ("assistant", ("hello",)))
    example.labels[:] = torch.where(example.labels == -100, example.input_ids, -100)  # as a bug might
    assert render(example, processor.tokenizer).plain == (
        "⟦[<s>][<|user|>]\nSay[<|end|>]\n[<|assistant|>]⟧hello[<|end|>]⟦\n⟧"
    )


def test_a_terminal_gets_colours_and_words_of_the_data_change_nothing(processor: Phi3VProcessor) -> None:
    hostile = "[bold]x[/bold] [red] :smile: \x1b[31m\x07 <|end|>"
    text = render(encode(processor, ("user", (hostile,)), ("assistant", (hostile,))), processor.tokenizer)
    shown = "[bold]x[/bold] [red] :smile: \\x1b[31m\\x07 <|end|>"
    assert text.plain.count(shown) == 2 and text.plain.count("[<|end|>]") == 2
    console = Console(force_terminal=True, color_system="standard", highlight=False, soft_wrap=True, width=300)
    with console.capture() as captured:
        console.print(text)
    codes = {line: re.findall(r"\x1b\[([0-9;]*)m\[bold", line) for line in captured.get().splitlines()}
    assert [code for found in codes.values() for code in found] == ["2", "32"]  # dim, green


def test_the_share_is_of_all_tokens() -> None:
    assert trained_share(12, 1_200) == "12 of 1,200 tokens trained (1.0 %)"
    assert trained_share(0, 0) == "0 of 0 tokens trained (0.0 %)"


# --- launch/check.py -----------------------------------------------------------------------------------------------


def check_output(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["check.py", *words])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    check.run_command()
    return capsys.readouterr().out


def test_check_prints_the_first_samples_of_the_runs_order_and_the_shares(
    settings_tree: dict, config_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = check_output(capsys, monkeypatch, "--config", str(config_file), "--show-labels", "5", "data.packing=false")
    settings = config.load(config_file, ["data.packing=false"])
    train = run.Data.open(settings.data.train, settings)
    first = run.plan(settings, train).sample_ids(0, 5).tolist()
    assert re.findall(r"train-00\d\.tar:\d+", out) == [train.table.sample_name(i).split("/")[-1] for i in first]
    answers = re.findall(r"⟦(A \w+ square, Price: \d+(?: hello)*)\[<\|end\|>\]⟧", out)
    assert len(answers) == out.count("⟦") - 1 == 5  # and the legend
    shares = [
        tuple(map(int, re.sub(",", "", f"{a} {b}").split())) for a, b in re.findall(r"([\d,]+) of ([\d,]+) tok", out)
    ]
    assert shares[:5] == [(train.lengths.label_tokens[i], train.lengths.tokens[i]) for i in first]
    assert shares[5] == tuple(map(sum, zip(*shares[:5], strict=True)))
    assert shares[6] == (train.lengths.label_tokens.sum(), train.lengths.tokens.sum())
    out = check_output(capsys, monkeypatch, "--config", str(config_file), "--show-labels", "999")
    assert "first 40 of 40 training samples" in out and out.count("⟧") == 41


@pytest.mark.parametrize("words", [("--show-labels", "0"), ("--show-labels", "-1"), ("--name", "-1")])
def test_wrong_numbers_are_refused(words: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["check.py", "--config", "none.yaml", *words])
    with pytest.raises(ConfigError, match=f"{words[0]} is {words[1]}: it must be at least"):
        check.run_command()


def test_check_counts_and_names_what_is_cut_and_left_out(settings_tree: dict, tmp_path: Path) -> None:
    with TarWriter(str(tmp_path / "long.tar"), mtime=0) as tar:
        for key in range(9):
            words = "red " * (900 if key == 0 else 300 if key < 5 else 1)
            turns = [{"role": "user", "content": words}, {"role": "assistant", "content": "A red square."}]
            record = b"?" if key == 8 else json.dumps({"messages": turns}).encode()
            tar.write({"__key__": f"k{key}", "json": record, "0.jpg": picture("red", 30, 30)})
    settings_tree["data"] |= {"train": [{"shards": str(tmp_path / "long.tar")}], "row_length_tokens": 500}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings_tree))
    command = [sys.executable, "launch/check.py", "--config", str(tmp_path / "c.yaml"), "data.fit=truncate_text"]
    done = subprocess.run(
        [*command, "--show-labels", "9"], cwd=REPOSITORY, env=environment(LC_ALL="C"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "data     8 of 9 samples" in done.stdout
    assert "fit      5 with text cut" in done.stdout and "left out 1 unusable" in done.stdout
    assert "train: 5 with text cut" in done.stdout and "… and 2 more (--name 5 names all)" in done.stdout
    assert re.search(r"long\.tar:k0: 1,2\d\d tokens, (49\d|500) after the cut", done.stdout)
    assert done.stdout.count("red … red") == 5
