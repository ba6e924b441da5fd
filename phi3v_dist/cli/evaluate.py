"""A saved model → scores and predictions on validation data, or the answer to one question; in one process.

python launch/evaluate.py --model runs/quickstart                  its newest checkpoint, with its own settings
python launch/evaluate.py --config launch/configs/quickstart.yaml --model runs/quickstart/export --out /tmp/scores
python launch/evaluate.py --model runs/quickstart --predict photo.jpg --prompt "What is shown in this image?"

--model takes a model folder (published or exported), an adapter exported alone, a run folder or one of its checkpoints.
Of a configuration only `data.validation`, `eval` and how samples are read is used: training shards need not be there.
"""

import argparse
import logging
import sys
from pathlib import Path

from rich.console import Console

from phi3v_dist import config
from phi3v_dist.cli.app import run_script
from phi3v_dist.errors import ConfigError
from phi3v_dist.evaluate.alone import evaluate, settings_around
from phi3v_dist.evaluate.predict import predict
from phi3v_dist.evaluate.sampling import Sampling
from phi3v_dist.model.saved import SavedModel
from phi3v_dist.observe import score_table
from phi3v_dist.parallel.topology import Topology
from phi3v_dist.printable import printable


def run_command() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the run's export, or else its newest checkpoint")
    parser.add_argument("--base", type=Path, help="model folder that a run or an adapter began with, if it moved")
    scores = parser.add_argument_group("scores and predictions")
    scores.add_argument("--config", type=Path, help="default: the settings of the run in which the model lies")
    scores.add_argument("--out", type=Path, help="where predictions are written; default: RUN/eval/export or the like")
    scores.add_argument(
        "--untuned",
        type=Path,
        help="records to compare with; default: those of the run's step 0, if it has them",
    )
    scores.add_argument("overrides", nargs="*", help="settings as key=value")
    asking = parser.add_argument_group("one question")
    asking.add_argument(
        "--predict", type=Path, nargs="*", metavar="IMAGE", help="pictures, in the order shown; or none"
    )
    asking.add_argument("--prompt", help="the question; plain words, which stand after the pictures")
    asking.add_argument("--max_new_tokens", type=int, default=256)
    asking.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time")
    asking.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest of this probability")
    asking.add_argument("--seed", type=int, default=0, help="of the draws")
    arguments = parser.parse_args()
    if arguments.predict is None and arguments.prompt is None:
        score(arguments)
    else:
        answer(arguments)


def answer(asked: argparse.Namespace) -> None:
    """Print the answer, and nothing else on stdout unless something is wrong."""
    problems = [f"--{name} is missing" for name in ("model", "prompt") if getattr(asked, name) is None]
    beside = [f"--{name}" for name in ("config", "out", "untuned") if getattr(asked, name)] + ["settings"] * bool(
        asked.overrides
    )
    if beside:
        problems.append(f"{' and '.join(beside)} has no place beside a question: leave it out")
    if problems:
        raise ConfigError(problems)
    logging.getLogger().setLevel(logging.WARNING)
    sampling = Sampling(asked.temperature, asked.top_p, asked.seed)
    saved = SavedModel.open(asked.model, asked.base)
    reply = predict(saved, asked.predict or [], asked.prompt, asked.max_new_tokens, sampling, Topology().device)
    print(printable(reply.text, keep="\n\t"), flush=True)
    if not reply.stopped:
        print(f"(cut after {reply.num_tokens:,} tokens: raise --max_new_tokens to hear the rest)", file=sys.stderr)


def score(asked: argparse.Namespace) -> None:
    """Write scores and predictions, and print the scores."""
    settings = config.load(asked.config, asked.overrides) if asked.config else None
    folder = asked.model
    if folder is None:
        if settings is None:
            raise ConfigError("nothing to evaluate: give --model FOLDER, or --config FILE for the model of its run")
        export = settings.run.folder / "export"
        folder = export if export.is_dir() else settings.run.folder
    saved = SavedModel.open(folder, asked.base)
    settings = settings or settings_around(saved, asked.overrides)
    out = asked.out or (saved.run or settings.run.folder) / "eval" / saved.name
    metrics = evaluate(saved, settings, out, asked.untuned)
    score_table.widened(Console()).print(score_table.printed(metrics))
    print(f"predictions are in {out}", flush=True)


def main() -> None:
    """Entry point of the installed command."""
    run_script(run_command)


if __name__ == "__main__":
    main()
