"""What every launch script shares: logging with the rank in front, and errors for people as text and exit code.

What comes in: a script's `main`. What goes out: its exit code. Surprise: ranks other than 0 wait before they leave
with an error, because a launcher kills the others at the first exit, and it is rank 0 that has the message.
"""

import logging
import os
import sys
import time
from collections.abc import Callable

from rich.console import Console

from phi3v_dist.errors import Phi3VError
from phi3v_dist.printable import printable

LAST_WORD_S = 5.0  # enough for rank 0 to print


class _OwnLines(logging.Formatter):
    """No message, whatever name of a file or sample is in it, looks like a line of the log or moves the cursor."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the library's name
        record.message = printable(record.message, keep="\n\t").replace("\n", "\n    ")
        return super().formatMessage(record)


def plain_console(soft_wrap: bool = False) -> Console:
    """A console that prints words as they are: `[red]` and `:fire:` in a name stay what they are.

    soft_wrap: lines may be longer than the terminal is wide, so that names can be copied.
    """
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=soft_wrap)


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; exit 0, or with the error's own code after its report on stderr."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_OwnLines(f"%(asctime)s [{rank}] %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        main()
    except Phi3VError as error:
        if rank != 0:
            time.sleep(LAST_WORD_S)
        print(error.report(), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit("interrupted")
