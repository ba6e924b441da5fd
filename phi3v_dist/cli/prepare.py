"""Prepare data and models before a run.

python launch/prepare.py sample --out data/catalogue            draw a product catalogue and index it
python launch/prepare.py tiny --out data/tiny-phi3v             a small Phi-3-V in the official layout
python launch/prepare.py sample --long --out data/long --model data/tiny-phi3v
                                                                long documents, the answer at a known depth
python launch/prepare.py import products.csv --out data/products --mapping launch/configs/imports/burberry.yaml
                                                                your own records and pictures to shards
python launch/prepare.py index 'shards/train-*.tar'             index tars written elsewhere
python launch/prepare.py lint 'shards/train-*.tar' --decode     every problem, with shard, key and what to do
python launch/prepare.py stats 'shards/train-*.tar' --model models/phi-3.5-vision
                                                                sizes, tokens at 4 and 16 crops, what fits which rows
python launch/prepare.py preview --config launch/configs/quickstart.yaml --out preview.html
                                                                samples as the model gets them, trained tokens coloured
python launch/prepare.py weights microsoft/Phi-3.5-vision-instruct --out models/phi-3.5-vision
                                                                fetch a model where there is a network, with digests
python launch/prepare.py audit runs/quickstart                  was each sample trained exactly once per epoch?
python launch/prepare.py audit runs/quickstart --step 120 --preview
                                                                the samples of a step, and a page that shows them
python launch/prepare.py weights --verify models/phi-3.5-vision
                                                                read it again and compare
python launch/prepare.py stage --config my.yaml data.cache.path=/local/shards data.cache.local_shards=true
                                                                copy the shards of a run to this node's own disk
python launch/prepare.py checkpoint old/checkpoints --config my.yaml run.name=continued
                                                                an old DeepSpeed ZeRO-3 checkpoint: a new run's start
"""

import argparse
import contextlib
import logging
import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from phi3v_dist import config
from phi3v_dist.attempt.requests import NOTICES
from phi3v_dist.cli import look
from phi3v_dist.cli.app import OWNER_ONLY, new_parser, plain_console, run_script
from phi3v_dist.config import SourceSettings
from phi3v_dist.data.shards import ShardTable
from phi3v_dist.errors import ConfigError, DataError
from phi3v_dist.invocation import as_typed
from phi3v_dist.progress import BYTES, show_progress

if TYPE_CHECKING:
    from phi3v_dist.data.importers.documents import DocumentsReport
    from phi3v_dist.data.importers.sample import CatalogueReport


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("prepare", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sample = commands.add_parser("sample", help="draw a product catalogue, in train and validation shards")
    sample.add_argument("--out", type=Path, required=True, help="folder for shards and their indexes")
    sample.add_argument(
        "--long", action="store_true", help="long documents of many pictures instead, with questions that ask for one"
    )
    sample.add_argument("--model", type=Path, help="with --long: model folder, whose processor counts their tokens")
    sample.add_argument(
        "settings", nargs="*",
        help="key=value, for example num_products=600; with --long for example document_tokens=[100000]",
    )  # fmt: skip
    sample.set_defaults(run=write_sample)
    tiny = commands.add_parser("tiny", help="write a small random Phi-3-V, tokenizer included")
    tiny.add_argument("--out", type=Path, required=True, help="model folder to write")
    tiny.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    tiny.set_defaults(run=write_tiny_model)
    look.add_commands(commands)
    imports = commands.add_parser(
        "import",
        help="write shards from CSV, JSON, Parquet, LLaVA, chat, Hugging Face data sets or folders of pictures",
    )
    imports.add_argument("source", help="file, 'pattern*', folder, or OWNER/NAME of the Hugging Face hub")
    imports.add_argument("--out", type=Path, required=True, help="folder for the shards and a config to train with")
    imports.add_argument("--mapping", type=Path, help="YAML that says what columns become; key=value words override it")
    imports.add_argument("--model", type=Path, help="model folder, whose tokenizer counts the text too")
    imports.add_argument("--num-ranks", type=int, help="ranks that will read the shards")
    imports.set_defaults(run=import_records)
    weights = commands.add_parser(
        "weights", help="fetch a Phi-3-V of the Hugging Face hub into a folder, or verify one"
    )
    weights.add_argument("repo", nargs="?", metavar="OWNER/NAME", help="model on the hub")
    weights.add_argument("--out", type=Path, help="folder to write; there already, it is verified")
    weights.add_argument("--revision", default="main", help="branch, tag or commit; default: main")
    weights.add_argument("--verify", type=Path, metavar="FOLDER", help="read a fetched folder again and compare")
    weights.set_defaults(run=fetch_weights)
    audit = commands.add_parser("audit", help="prove from a run's ledger that each sample was trained once per epoch")
    audit.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder")
    audit.add_argument("settings", nargs="*", help="key=value for what was moved since, such as model.path=…")
    audit.add_argument("--step", type=int, help="name the samples of this step instead")
    audit.add_argument(
        "--preview", type=Path, nargs="?", const=Path(), metavar="HTML",
        help="with --step: also write a page that shows them; default: RUN/step-N.html",
    )  # fmt: skip
    audit.set_defaults(run=audit_run)
    checkpoint = commands.add_parser(
        "checkpoint", help="import a DeepSpeed ZeRO-3 checkpoint, weights and optimizer, for a new run to begin with"
    )
    checkpoint.add_argument(
        "source", type=Path, help="folder that was given to save_checkpoint, or a global_step… in it"
    )
    checkpoint.add_argument(
        "--config", required=True, help="of the run that shall go on from it; key=value words override it"
    )
    checkpoint.add_argument("--tag", help="which one; default: what `latest` says")
    checkpoint.set_defaults(run=import_deepspeed)
    staging = commands.add_parser("stage", help="copy the shards of a run to this node's own disk, before it begins")
    staging.add_argument("--config", required=True, help="of the run; key=value words override it")
    staging.set_defaults(run=stage_shards)
    return parser


def run_command() -> None:
    parser = build_parser()
    arguments, words = parser.parse_known_args()  # argparse takes no `*` in two places
    if words and arguments.run not in (import_records, import_deepspeed, stage_shards):
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    arguments.setting_words = words
    arguments.run(arguments)


def write_sample(arguments: argparse.Namespace) -> None:
    from phi3v_dist.data.importers.documents import LongDocumentSettings, write_documents
    from phi3v_dist.data.importers.sample import CatalogueSettings, write_catalogue

    if arguments.long != (arguments.model is not None):
        raise ConfigError(
            "--long counts tokens with the processor of a model: give --long --model FOLDER together, for example "
            f"--model data/tiny-phi3v (made by `{as_typed('launch/prepare.py')} tiny --out data/tiny-phi3v`)"
        )
    with show_progress("samples") as progress:
        show = partial(progress, "drawing")
        report: CatalogueReport | DocumentsReport
        if arguments.long:
            settings = config.parse(LongDocumentSettings, arguments.settings)
            report = write_documents(arguments.out, settings, arguments.model, show)
        else:
            report = write_catalogue(arguments.out, config.parse(CatalogueSettings, arguments.settings), show)
    ShardTable.open([SourceSettings(shards=[str(path) for path in report.shards])])
    plain_console().print(report.table())


def write_tiny_model(arguments: argparse.Namespace) -> None:
    from phi3v_dist.data.importers.sample import vocabulary_text
    from phi3v_dist.model.tiny import write_tiny

    if (arguments.out / "model.safetensors").exists():
        logging.info("%s is there already", arguments.out)
        return
    num_parameters = write_tiny(arguments.out, vocabulary_text(), arguments.seed)
    logging.info("%s: a Phi-3-V of %s parameters, randomly initialised", arguments.out, f"{num_parameters:,}")


def import_records(arguments: argparse.Namespace) -> None:
    from phi3v_dist.data.importers import settings, starter
    from phi3v_dist.data.importers.importer import Import

    ranks = [f"num_ranks={arguments.num_ranks}"] if arguments.num_ranks is not None else []
    mapping = settings.load(arguments.mapping, [*arguments.setting_words, *ranks])
    with show_progress("records") as progress:
        manifest = Import(arguments.source, arguments.out, mapping, arguments.model, progress).run()
    plain_console().print(starter.tables(arguments.out, manifest), crop=False)


def fetch_weights(arguments: argparse.Namespace) -> None:
    from phi3v_dist.model import hub

    if arguments.verify and not (arguments.repo or arguments.out):
        hub.verify(arguments.verify)
        logging.info("%s: every file is as it was fetched", arguments.verify)
    elif arguments.repo and arguments.out and not arguments.verify:
        digests = hub.fetch(arguments.repo, arguments.out, arguments.revision)
        size_bytes = sum(file.size_bytes for file in digests.files.values())
        logging.info(
            "%s: %s at commit %s, %d files of %.2f GB, as the hub has them", arguments.out, digests.repo,
            digests.commit, len(digests.files), size_bytes / 1e9,
        )  # fmt: skip
    else:
        raise ConfigError("give OWNER/NAME and --out FOLDER to fetch a model, or only --verify FOLDER to look at one")


def stage_shards(arguments: argparse.Namespace) -> None:
    from phi3v_dist.data.staging import stage

    logging.getLogger().setLevel(logging.INFO)  # a rank here is a node, and each has much to say
    settings = config.load(arguments.config, arguments.setting_words)
    os.umask(OWNER_ONLY)  # a copy must not be open to more than the shard is
    os.nice(19)
    with contextlib.suppress(OSError, psutil.Error):  # some containers forbid it
        psutil.Process().ionice(psutil.IOPRIO_CLASS_BE, 7)
    stop = threading.Event()
    for number in NOTICES:
        signal.signal(number, lambda *_: stop.set())
    staged = stage(settings.data, stop)
    assert settings.data.cache.path is not None  # `stage` refuses that
    for line in staged.lines(settings.data.cache.path):
        logging.info("%s", line)


def import_deepspeed(arguments: argparse.Namespace) -> None:
    from phi3v_dist.survive.deepspeed_files import DeepSpeedCheckpoint
    from phi3v_dist.survive.deepspeed_import import import_checkpoint

    settings = config.load(arguments.config, arguments.setting_words)
    source = DeepSpeedCheckpoint.open(arguments.source, arguments.tag)
    folder = import_checkpoint(source, settings)
    logging.info(
        "%s: weights and optimizer of %s, step %s, saved by %d ranks. %s goes on from it on any number of "
        "ranks; its data begins at the start, and its steps and learning rates count from 1",
        *(folder, source.folder, source.head.get("global_steps"), source.world_size, as_typed("launch/train.py")),
    )


def audit_run(arguments: argparse.Namespace) -> None:
    from phi3v_dist.data import audit, audit_report
    from phi3v_dist.data.ledger import LEDGER_NAME, LedgerReader
    from phi3v_dist.run import Data, plan

    if arguments.preview and arguments.step is None:
        raise ConfigError("--preview shows the samples of one step: give --step N too")
    folder = arguments.run_folder
    settings = config.of_run(folder, arguments.settings)
    reader = LedgerReader(folder / LEDGER_NAME)
    data = Data.open(settings.data.train, settings)
    if arguments.step is not None:
        record = audit.step_of(reader, arguments.step)
        print("\n".join(audit_report.step_lines(record, data.table, data.lengths)))
        if arguments.preview is not None:
            from phi3v_dist.data.preview_page import write_preview

            path = folder / f"step-{record.step}.html" if arguments.preview == Path() else arguments.preview
            write_preview(path, f"{folder.name}, step {record.step}", record.sample_ids, data)
            logging.info("%s shows them", path)
        return
    if settings.train.overfit_one_batch:
        raise ConfigError("`train.overfit_one_batch` repeats one step on purpose; `--step N` names its samples")
    planner = plan(settings, data)
    checkpoint, listed = audit_report.newest_head(folder), audit_report.listed_in(folder)
    with show_progress(BYTES) as progress:
        show = partial(progress, "verifying the ledger")
        found = audit.audit(reader, data.table, data.lengths, planner, checkpoint, listed, show)
    for part in audit_report.tables_of(found):
        plain_console().print(part)
    print("\n".join(audit_report.lines_of(found)))
    if found.problems:
        raise DataError(list(found.problems))


def main() -> None:
    """Entry point of `phi3v-prepare` and `launch/prepare.py`."""
    run_script(run_command, private=False)  # shards and models are meant to be shared


if __name__ == "__main__":
    main()
