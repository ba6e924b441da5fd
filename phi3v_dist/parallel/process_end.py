"""Ends a process that has been a rank.

Note: gloo's worker threads may hold tensors when the work of a rank is done. To free one they need the GIL, and a
thread that asks for it while the interpreter shuts down is ended by `pthread_exit`. C++ answers that with "terminate
called without an active exception", and the rank ends with SIGABRT after its work was done. So a rank does what Python
does at its end, but for shutting down the interpreter.
"""

import atexit
import os
import sys
import threading
from typing import NoReturn

_is_rank = False


def mark_rank() -> None:
    """From now on this process is a rank: it has, or has had, a process group."""
    global _is_rank
    _is_rank = True


def is_rank() -> bool:
    return _is_rank


def end_process(exit_code: int) -> NoReturn:
    """Wait for threads, call what is registered with `atexit`, flush the streams, and exit.

    It does not leave the process group: other ranks may be gone, and gloo would wait for them. `Topology.stop` does,
    after a run that ended well.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing ends its processes
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(exit_code & 0xFF)


def end_as_interpreter(error: BaseException | None) -> NoReturn:
    """`end_process` with the message and exit code that the interpreter gives to an exception that nobody catches."""
    if error is None:
        end_process(0)
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        end_process(1)
    if error.code is None or isinstance(error.code, int):
        end_process(error.code or 0)
    print(error.code, file=sys.stderr)
    end_process(1)
