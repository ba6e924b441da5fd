"""What every launch script shares: logging with the rank in front, and errors for people as text and exit code.

What comes in: a script's `main`. What goes out: its exit code. Surprise: ranks other than 0 wait before they leave
with an error, because a launcher kills the others at the first exit, and it is rank 0 that has the message.
"""

import logging
import os
import sys
import time
from collections.abc import Callable

from phi3v_dist.errors import Phi3VError

LAST_WORD_S = 5.0  # enough for rank 0 to print


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; exit 0, or with the error's own code after its report on stderr."""
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s [{rank}] %(message)s", datefmt="%H:%M:%S", stream=sys.stdout, force=True,
    )  # fmt: skip
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
