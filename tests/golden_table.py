"""Every golden case through the public API → tables of the largest differences, beside what is tolerated.

    make golden

Exits 1 when anything is off. Processor and chat template need the published tokenizer files; where they are missing
(PHI3V_ASSETS), it says so and leaves them out.
"""

import json
import sys
from itertools import chain

import torch
from conftest import ASSETS
from golden_cases import (
    CONFIGS,
    CURVE_TOLERANCES,
    FINAL_TOLERANCES,
    GOLDEN,
    TOLERANCES,
    Case,
    Outcome,
    all_cases,
    run_case,
    run_curve,
)
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from phi3v_dist.data.processor import Phi3VProcessor

WIDTH = 150  # whatever the terminal's: a figure cut short is worse than a broken line
CROP_TOLERANCES = {"local crops": 1e-6, "global crop": 1e-4}  # golden/README.md's


class Report:
    """Rows of differences under one set of tolerances, and everything that was off."""

    def __init__(self, console: Console):
        self.console, self.failures = console, list[str]()

    def show(
        self, title: str, head: list[str], rows: list[tuple[list[str], Outcome]], limits: dict[str, float]
    ) -> None:
        table = Table(title=title, title_justify="left", title_style="bold", show_footer=True, box=SIMPLE_HEAD)
        for i, name in enumerate(head):
            table.add_column(name, footer="tolerance" if i == 0 else "", no_wrap=True)
        for name, limit in limits.items():
            table.add_column(name.replace("_", "\n"), footer=f"{limit:.0e}", justify="right", no_wrap=True)
        for labels, outcome in rows:
            cells = [_cell(outcome.differences.get(name), limit) for name, limit in limits.items()]
            table.add_row(*labels, *cells)
            self.failures += [f"{' '.join(labels)}: {failure}" for failure in outcome.failures(limits)]
        worst = [max((o.differences.get(name, 0.0) for _, o in rows), default=0.0) for name in limits]
        table.add_section()
        table.add_row("largest", *[""] * (len(head) - 1), *(f"{value:.1e}" for value in worst), style="bold")
        self.console.print(table)


def _cell(difference: float | None, limit: float) -> str:
    if difference is None:
        return "-"
    return f"{difference:.1e}" if difference <= limit else f"[bold red]{difference:.1e}[/]"


def largest(case: Case, failures: list[str]) -> Outcome:
    """Over everything the case must hold under; what is off is named with where."""
    whole = Outcome()
    for rule, attention in case.variants:
        outcome = run_case(case, rule, attention)
        failures += [f"under {rule}, {attention}: {case.name}: {line}" for line in outcome.mismatches]
        for name, value in outcome.differences.items():
            whole.note(name, value)
    return whole


def crops(processor: Phi3VProcessor, record: dict, samples: dict[str, torch.Tensor]) -> Outcome:
    """One stored picture, at the sampled values."""
    outcome, key = Outcome(), f"{record['name']}/c{processor.num_crops}"
    wanted = next(result for result in record["results"] if result["num_crops"] == processor.num_crops)
    output = processor("<|image_1|>", Image.open(GOLDEN / record["png"]))
    found = (output.image_sizes[0].tolist(), list(output.num_img_tokens), list(output.pixel_values.shape))
    if found != (wanted["image_size_hw"], [wanted["num_img_tokens"]], wanted["pixel_values_shape"]):
        outcome.mismatches.append(f"size, tokens and shape are {found}")
        return outcome
    crop, channel, row, column = samples[f"{key}/idx"].long().T
    difference = (output.pixel_values[0, crop, channel, row, column] - samples[f"{key}/val"]).abs()
    for name, chosen in (("local crops", crop > 0), ("global crop", crop == 0)):
        outcome.note(name, difference[chosen].max() if chosen.any() else 0.0)
    return outcome


def count_ids(model: str) -> tuple[list[int], list[str]]:
    """[processor texts, chats] that were compared, and those whose text or ids are others than the published ones."""
    compared, different = [0, 0], []
    for case in json.loads((GOLDEN / "processor.json").read_text()):
        if case["model"] == model:
            processor = Phi3VProcessor.from_pretrained(ASSETS / model, case["num_crops"])
            images = [Image.open(GOLDEN / "images" / f"{name}.png") for name in case["images"] or []]
            ids = processor(case["text"], images or None).input_ids[0].tolist()
            wanted = chain.from_iterable([r] if isinstance(r, int) else [r[0]] * r[1] for r in case["input_ids_rle"])
            compared[0] += 1
            different += [f"{model}: processor case {case['case']}"] if ids != list(wanted) else []
    tokenizer = Phi3VProcessor.from_pretrained(ASSETS / model).tokenizer
    for case in json.loads((GOLDEN / "chat_template.json").read_text()):
        if case["model"] == model:
            text = tokenizer.apply_chat_template(
                case["messages"], tokenize=False, add_generation_prompt=case["add_generation_prompt"]
            )
            compared[1] += 1
            same = text == case["text"] and tokenizer(text).input_ids == case["ids_with_bos"]
            different += [] if same else [f"{model}: chat {case['text']!r}"]
    return compared, different


def main() -> None:
    torch.set_num_threads(1)
    console = Console(width=WIDTH)
    report = Report(console)
    for config in CONFIGS:
        rows = [([c.name, ", ".join(c.rules)], largest(c, report.failures)) for c in all_cases() if c.config == config]
        title = f"{config}: forward and backward, largest over the LongRoPE rules and eager attention"
        report.show(title, ["case", "under"], rows, TOLERANCES)
    for config in CONFIGS:
        steps, final = run_curve(config)
        rows = [([f"step {step.number}", step.case], step.outcome) for step in steps]
        report.show(f"{config}: training curve (norms relative)", ["", "case"], rows, CURVE_TOLERANCES)
        report.show(f"{config}: weights after it (relative)", [""], [(["all of them"], final)], FINAL_TOLERANCES)
    if ASSETS.is_dir():
        samples = load_file(GOLDEN / "image_processor_samples.safetensors")
        records = [r for r in json.loads((GOLDEN / "image_processor.json").read_text())["images"] if r["png"]]
        rows = []
        for num_crops in (4, 16):
            processor = Phi3VProcessor.from_pretrained(ASSETS / "phi3_vision", num_crops)
            rows += [([r["name"], f"{num_crops} crops"], crops(processor, r, samples)) for r in records]
        report.show("image processor", ["picture", ""], rows, CROP_TOLERANCES)
        for model in ("phi3_vision", "phi3_5_vision"):
            (texts, chats), different = count_ids(model)
            report.failures += different
            console.print(f"{model}: ids of {texts} processor cases and {chats} chats, {len(different)} different")
    else:
        console.print(f"left out: image processor, processor, chat template (no tokenizer files at {ASSETS})")
    for failure in report.failures:
        console.print(f"[bold red]off[/] {failure}")
    console.print("all within tolerance" if not report.failures else f"{len(report.failures)} off")
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()
