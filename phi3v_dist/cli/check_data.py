"""What `launch/check.py` prints about the data of a run: batch arithmetic, samples left out, labels."""

import itertools
import sys

from rich.text import Text

from phi3v_dist import run
from phi3v_dist.cli.app import plain_console
from phi3v_dist.config import Settings
from phi3v_dist.data import outcomes, preview
from phi3v_dist.data.order import Order
from phi3v_dist.data.plan import PlannedRow
from phi3v_dist.data.samples import BadSample
from phi3v_dist.planner import door

ORDER_WINDOW = 1024  # positions looked up together


def first_rows(settings: Settings) -> tuple[list[PlannedRow], int | None]:
    """Rows of the first steps as they will be trained, and how many an epoch has. Raises what `Data.open` does."""
    train = run.Data.open(settings.data.train, settings)
    steps = list(itertools.islice(run.plan(settings, train), door.NUM_STEPS_SEEN))
    rows = [row for step in steps for row in step.rows]
    tokens = sum(row.tokens for row in rows)
    usable = train.lengths.tokens[train.lengths.tokens <= settings.data.row_length_tokens]
    return rows, round(int(usable.sum()) * len(rows) / tokens) if tokens else None


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
