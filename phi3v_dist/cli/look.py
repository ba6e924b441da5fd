"""The commands of prepare.py that look at shards and change nothing but sidecar files: index, lint, stats, preview.

What comes in: shards by pattern, or a run's configuration that names them. What goes out: tables, a page, an exit code.
Surprise: shards need no configuration. Without one, a sample's conversation is its `messages`, or its caption as the
answer to a plain question; `--prompt` and `--answer` say otherwise.
"""

import argparse
import itertools
import json
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.text import Text

from phi3v_dist import config
from phi3v_dist.cli.app import plain_console
from phi3v_dist.config import Settings, SourceSettings
from phi3v_dist.data.fetch import Fetcher
from phi3v_dist.data.samples import BadSample, default_source
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import ConfigError, DataError
from phi3v_dist.progress import show_progress

PROBED_SAMPLES = 64  # looked at for one that says what the others look like
LONGEST_ROW = 131072


def add_commands(commands: Any) -> None:
    """Add the four commands to prepare.py's parser."""
    index = commands.add_parser("index", help="index tar shards and name what is wrong with them")
    index.add_argument("words", nargs="+", metavar="SHARDS", help="paths or patterns of tars")
    index.set_defaults(run=index_shards, config=None, prompt=None, answer=None, system=None)
    lint = _add(commands, "lint", "every problem of shards, by kind, with what to do; exit code 3 if there is one")
    lint.add_argument("--deep", action="store_true", help="read every byte and compare it with the index's checksums")
    lint.add_argument("--decode", action="store_true", help="decode every picture")
    lint.add_argument("--name", type=_count, default=5, metavar="N", help="findings named of each kind (default 5)")
    lint.add_argument("--threads", type=_count, default=4, metavar="N", help="shards read at the same time (default 4)")
    lint.set_defaults(run=lint_shards)
    stats = _add(commands, "stats", "samples, pictures and tokens at 4 and 16 crops, and which rows they fit into")
    stats.add_argument(
        "--model", type=Path, help="model folder whose tokenizer counts the text; default: pictures only"
    )
    stats.add_argument("--json", action="store_true", help="print JSON instead of tables")
    stats.set_defaults(run=show_stats)
    preview = _add(commands, "preview", "an HTML page of samples with pictures, prompt and trained tokens")
    preview.add_argument("--model", type=Path, help="model folder, where no --config names one")
    preview.add_argument("--out", type=Path, default=Path("preview.html"), metavar="HTML", help="page to write")
    preview.add_argument("--split", choices=("train", "validation"), default="train", help="which shards (train)")
    which = preview.add_mutually_exclusive_group()
    which.add_argument(
        "--num", type=_count, default=20, metavar="N", help="the first N of the run's order (default 20)"
    )
    which.add_argument("--key", action="append", metavar="KEY", help="samples of this key; may be given several times")
    which.add_argument("--step", type=_count, metavar="N", help="samples that step N of the run trains on")
    preview.set_defaults(run=write_preview_page)


def index_shards(arguments: argparse.Namespace) -> None:
    begin = time.monotonic()
    with show_progress("shards") as report:
        made = 0

        def on_progress(done: int, total: int) -> None:
            nonlocal made
            made = total
            report("indexing", done, total)

        table = ShardTable.open(_sources(arguments), on_progress=on_progress)
    seconds = time.monotonic() - begin
    for shard, key, why in table.faults():
        if key or not made:  # of shards indexed just now, damage has been logged
            logging.warning("%s: %s%s", shard, f"sample '{key}': " if key else "", why)
    counts, size_mb = table.bad_counts, float(table.rows.tar_size_bytes.sum()) / 1e6
    logging.info(
        "%s samples in %s shards of %s MB: %s unusable, %s odd but used, %s damaged places",
        *(f"{count:,}" for count in (counts.samples, len(table.shards), round(size_mb))),
        *(f"{count:,}" for count in (counts.bad, counts.notes, counts.damaged_places)),
    )
    if made:
        logging.info("%d indexes made in %.1f s (%.0f MB/s)", made, seconds, size_mb / max(seconds, 1e-3))
    else:
        logging.info("every shard had its index")


def lint_shards(arguments: argparse.Namespace) -> None:
    from phi3v_dist.data.lint import NOTICES, PROBLEMS, LintOptions, lint

    table = ShardTable.open(_sources(arguments, guess=True))
    options = LintOptions(arguments.deep, arguments.decode, arguments.threads)
    with show_progress("samples") as progress:
        report = lint(table, options, partial(progress, "checking"))
    console = plain_console(soft_wrap=True)
    for colour, kinds in (("red", PROBLEMS), ("yellow", NOTICES)):
        for title, fix, findings in report.of(kinds):
            console.print(Text.assemble("\n", (f"{len(findings):,} x {title}", colour), f": {fix}"))
            for finding in findings[: arguments.name]:
                console.print(f"  {finding}")
            if (more := len(findings) - arguments.name) > 0:
                console.print(f"  … and {more:,} more (--name {len(findings)} names all)")
    notices = sum(map(len, report.findings.values())) - report.num_problems
    console.print(
        f"\n{report.num_samples:,} samples in {report.num_shards:,} shards: {report.num_problems:,} problems, "
        f"{notices:,} notices"
    )
    if not arguments.decode:
        read = "" if arguments.deep else "the bytes of pictures (--deep), "
        console.print(f"not looked at: {read}whether pictures decode (--decode, which also reads all bytes)")
    if report.num_problems:
        raise DataError([f"{len(findings):,} x {title}" for title, _, findings in report.of(PROBLEMS)])


def show_stats(arguments: argparse.Namespace) -> None:
    from phi3v_dist.data.processor import Phi3VProcessor
    from phi3v_dist.data.stats import NUM_CROPS, collect

    settings = _settings(arguments) if arguments.config else None
    model = arguments.model or (settings.model.path if settings else None)
    processor = Phi3VProcessor.from_pretrained(model, NUM_CROPS[0]) if model else None
    table = ShardTable.open(_sources(arguments, guess=True))
    stats = collect(table, processor)
    if arguments.json:
        print(json.dumps(stats.to_json(), indent=2))
        return
    console = plain_console()
    for part in stats.tables():
        console.print(part, soft_wrap=isinstance(part, Text))


def write_preview_page(arguments: argparse.Namespace) -> None:
    from phi3v_dist import run
    from phi3v_dist.data.order import Order
    from phi3v_dist.data.preview_page import find_samples, write_preview

    if not arguments.config and not arguments.model:
        raise ConfigError("give --config, or --model FOLDER with the tokenizer that encodes the shards' texts")
    if arguments.step and (not arguments.config or arguments.split != "train"):
        raise ConfigError("--step needs the --config of a run, and shows what it trains on")
    settings = _settings(arguments)
    sources = settings.data.train if arguments.split == "train" else settings.data.validation
    if not sources:
        raise ConfigError(f"--split {arguments.split}: the configuration names no such shards")
    data = run.Data.open(sources, settings)
    what = arguments.config or ", ".join(arguments.words)
    title = f"{len(data.table):,} samples of {what}" if arguments.split == "train" else f"validation samples of {what}"
    if arguments.key:
        sample_ids = [sample_id for key in arguments.key for sample_id in find_samples(data.table, key)]
    elif arguments.step:
        planner = run.plan(settings, data)
        num_steps = run.count_steps(settings, planner)
        if arguments.step > num_steps:
            raise ConfigError(f"--step {arguments.step}: the run has {num_steps:,} steps")
        sample_ids = list(next(itertools.islice(planner, arguments.step - 1, None)).sample_ids)
        title = f"step {arguments.step:,} of {what}"
    else:
        order = Order(data.table, settings.run.seed)
        sample_ids = order.sample_ids(0, min(arguments.num, order.num_samples)).tolist()
    write_preview(arguments.out, title, sample_ids, data)
    logging.info("%s shows %d samples", arguments.out, len(sample_ids))


def _add(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what)
    parser.add_argument("words", nargs="*", metavar="SHARDS", help="patterns; with --config: settings as key=value")
    parser.add_argument("--config", help="a run's YAML, whose shards and templates are taken")
    for option in ("prompt", "answer", "system"):
        parser.add_argument(f"--{option}", help=f"Jinja template, as a source's `{option}`")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _settings(arguments: argparse.Namespace) -> Settings:
    """The configuration's, or those of a run that would train on the shards named."""
    if arguments.config:
        return config.load(arguments.config, arguments.words)
    train = [source.model_dump() for source in _sources(arguments, guess=True)]
    data = {"train": train, "row_length_tokens": LONGEST_ROW}
    return Settings.model_validate({"model": {"path": arguments.model}, "data": data})


def _sources(arguments: argparse.Namespace, guess: bool = False) -> list[SourceSettings]:
    """Both sides of a configuration, or one source of the shards named; `guess`: look at a sample for its format."""
    if arguments.config:
        settings = _settings(arguments)
        return [*settings.data.train, *settings.data.validation]
    if not arguments.words:
        raise ConfigError("name shards, for example 'shards/train-*.tar', or a run's configuration with --config")
    if wrong := [word for word in arguments.words if word.endswith((".yaml", ".yml"))]:
        raise ConfigError(f"{wrong[0]} is no shard; a configuration is given with --config {wrong[0]}")
    source = SourceSettings(
        shards=arguments.words, prompt=arguments.prompt, answer=arguments.answer, system=arguments.system
    )
    if not guess or arguments.prompt or arguments.answer or arguments.system:
        return [source]
    table = ShardTable.open([source])
    fetcher = Fetcher(table)
    for sample_id in range(min(PROBED_SAMPLES, len(table))):
        try:
            return [default_source(arguments.words, fetcher.fetch(sample_id, text_only=True))]
        except (BadSample, ValueError):
            continue
    return [source]
