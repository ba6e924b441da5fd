"""What every launch script shares: logging with attempt and rank in front, and errors for people as text and exit code.

What comes in: a script's `main`. What goes out: its exit code. Surprise: ranks other than 0 wait before they leave
with an error, because a launcher kills the others at the first exit, and it is rank 0 that has the message. And what
a run leaves on the disk is for its owner alone (umask 077), whatever the shell's own umask is.
"""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable

from rich.console import Console

from phi3v_dist import __version__
from phi3v_dist.attempt.build_cache import own_build_folder
from phi3v_dist.errors import Phi3VError
from phi3v_dist.invocation import as_typed
from phi3v_dist.parallel.process_end import end_as_interpreter, is_rank
from phi3v_dist.printable import printable
from phi3v_dist.secrets import guard_process, redacted
from phi3v_dist.watch import faults, heartbeat

OWNER_ONLY = 0o077


def new_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser with `--version`, whose help is the text `doc` with commands as they are typed here.

    name: of the command, and so of its script in `launch/`.
    """
    parser = argparse.ArgumentParser(
        prog=as_typed(f"python launch/{name}.py"),
        description=as_typed(doc or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"phi3v-dist {__version__}")
    return parser


class _OwnLines(logging.Formatter):
    """No message, whatever name of a file or sample is in it, looks like a line of the log, moves the cursor or holds
    a secret."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the library's name
        record.message = printable(redacted(record.message), keep="\n\t").replace("\n", "\n    ")
        return super().formatMessage(record)


def plain_console(soft_wrap: bool = False) -> Console:
    """A console that prints words as they are: `[red]` and `:fire:` in a name stay what they are.

    soft_wrap: lines may be longer than the terminal is wide, so that names can be copied.
    """
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=soft_wrap)


def _lines(who: str) -> logging.Formatter:
    return _OwnLines(f"%(asctime)s %(levelname)s {who} %(message)s", datefmt="%Y-%m-%d %H:%M:%S")


def say_attempt(number: int, rank: int) -> None:
    """From now on each line of the log says which attempt of the run it is from: one file may hold several."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, _OwnLines):
            handler.setFormatter(_lines(f"[attempt {number}, rank {rank}]"))


def run_script(main: Callable[[], None], private: bool = True) -> None:
    """Run `main`; exit 0, or with the error's own code after its report on stderr. The process is then ours: its
    logging, streams, hooks and umask stay as they are set here. If `main` made it a rank, it ends here.

    private: no file that is made can be read by others; False where the outputs are meant to be shared.
    """
    was_rank, ended_by = is_rank(), None
    try:
        _run(main, private)
    except BaseException as error:
        ended_by = error
    if is_rank() and not was_rank:
        end_as_interpreter(ended_by)
    if ended_by is not None:
        raise ended_by


def _run(main: Callable[[], None], private: bool) -> None:
    if private:
        os.umask(OWNER_ONLY)
    guard_process()
    own_build_folder()
    said = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    rank = int(said) if said.isdecimal() else 0  # what is wrong with it is said where ranks are read
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_lines(f"[rank {rank}]"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)
    for chatty in ("DeepSpeed", "compilers"):  # setuptools says what DeepSpeed tries to build
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's to mend
    try:
        faults.announce()
        main()
        heartbeat.close(heartbeat.DONE)
    except Phi3VError as error:
        heartbeat.close(heartbeat.FAILED, redacted(error.report()), error.exit_code)
        if rank != 0:
            time.sleep(heartbeat.LAST_WORD_S)
        print(redacted(error.report()), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        heartbeat.close(heartbeat.FAILED, "interrupted", 1)
        sys.exit("interrupted")
    except Exception as error:
        heartbeat.close(heartbeat.FAILED, redacted(f"{type(error).__name__}: {error}"), 1)
        raise
