"""Everything that can be wrong, before a node is allocated: settings, shards, batch arithmetic, labels.

python launch/check.py --config launch/configs/quickstart.yaml --world_size 64
python launch/check.py --config launch/configs/quickstart.yaml --show-labels 3
"""

import argparse
import itertools
import sys

from rich.text import Text

from phi3v_dist import config, run
from phi3v_dist.cli import plain_console, run_script
from phi3v_dist.config import Settings
from phi3v_dist.data import outcomes, preview
from phi3v_dist.data.order import Order
from phi3v_dist.data.samples import BadSample
from phi3v_dist.errors import ConfigError

ORDER_WINDOW = 1024  # positions looked up together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--world_size", type=int, default=1, help="ranks that the job will have")
    parser.add_argument("--show-labels", type=int, metavar="N", help="print the first N samples, trained tokens marked")
    parser.add_argument(
        "--name", type=int, default=3, metavar="N", help="samples named of each kind cut or left out (default 3)"
    )
    parser.add_argument("overrides", nargs="*", help="settings as key=value")
    arguments = parser.parse_intermixed_args()
    numbers = (("world_size", arguments.world_size, 1), ("show-labels", arguments.show_labels, 1))
    for option, value, least in (*numbers, ("name", arguments.name, 0)):
        if value is not None and value < least:
            raise ConfigError(f"--{option} is {value}: it must be at least {least}")
    settings = config.load(arguments.config, arguments.overrides, lambda s: run.problems(s, arguments.world_size))
    train = run.Data.open(settings.data.train, settings)
    num_steps = run.count_steps(settings, run.plan(settings, train))
    for line in run.describe(settings, train, num_steps, arguments.world_size):
        print(line)
    name_outcomes("train", train, arguments.name)
    if settings.data.validation:
        name_outcomes("validation", run.Data.open(settings.data.validation, settings), arguments.name)
    if arguments.show_labels:
        show_labels(settings, train, arguments.show_labels)


def name_outcomes(side: str, data: run.Data, num_samples: int) -> None:
    """The first samples that were cut to fit, and those left out, with the reason."""
    policy = data.decoder.processor.fit_policy
    for outcome in [*outcomes.cut(data.lengths, policy), *outcomes.left_out(data.lengths, policy)]:
        print(f"\n{side}: {outcome}")
        for line in outcomes.names(outcome, data.table, data.lengths, num_samples):
            print(f"  {line}")
        if (more := len(outcome.sample_ids) - num_samples) > 0:
            print(f"  … and {more:,} more (--name {len(outcome.sample_ids)} names all)")


def show_labels(settings: Settings, train: run.Data, num_samples: int) -> None:
    """The first training samples of the run's order as they will be trained."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # words in any script
    console = plain_console(soft_wrap=True)
    lengths, processor = train.lengths, train.decoder.processor
    order = Order(train.table, settings.run.seed)
    fits = (lengths.tokens > 0) & (lengths.tokens <= settings.data.row_length_tokens)
    windows = (range(begin, begin + ORDER_WINDOW) for begin in range(0, order.num_samples, ORDER_WINDOW))
    stream = (i for window in windows for i in order.sample_ids(window.start, window.stop).tolist() if fits[i])
    ids = list(itertools.islice(stream, min(num_samples, int(fits.sum()))))
    console.print(Text(f"\nfirst {len(ids)} of {fits.sum():,} training samples: ") + preview.LEGEND)
    trained = tokens = 0
    for number, sample_id in enumerate(ids, start=1):
        console.rule(Text(f"{number}  {train.table.sample_name(sample_id)}"), align="left")
        try:
            example = train.decoder.example(sample_id, int(lengths.tokens[sample_id]))
        except BadSample as error:
            console.print(Text(f"cannot be used, and would be skipped in training: {error.reason}"))
            continue
        num_trained = int((example.labels != preview.IGNORE).sum())
        trained, tokens = trained + num_trained, tokens + len(example.labels)
        console.print(preview.render(example, processor.tokenizer))
        console.print(preview.trained_share(num_trained, len(example.labels)))
    console.rule()
    console.print(f"shown:    {preview.trained_share(trained, tokens)}")
    all_trained, all_tokens = int(lengths.label_tokens[fits].sum()), int(lengths.tokens[fits].sum())
    console.print(f"all data: {preview.trained_share(all_trained, all_tokens)}")


def cli() -> None:
    """Entry point of the installed command."""
    run_script(main, private=False)  # it writes indexes beside shards, and those are meant to be shared


if __name__ == "__main__":
    cli()
