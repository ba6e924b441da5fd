"""Records a rank's first error for torchrun, whose summary then names the cause.

Note: torch's own handler would write messages and tracebacks with the credentials that are in them.
"""

import json
import time
import traceback
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from phi3v_dist.errors import Phi3VError
from phi3v_dist.secrets import redacted


class RedactingErrorHandler(ErrorHandler):
    """Writes torch's format to the file that torchrun names in the environment; without torchrun, nothing."""

    def record_exception(self, e: BaseException) -> None:
        path = self._get_error_file_path()
        if path is None:
            return

        # torchrun prints `py_callstack` alone. The report of an expected error is worth more there than its stack.
        shown = e.report() if isinstance(e, Phi3VError) else "".join(traceback.format_exception(e))
        message = {
            "message": redacted(f"{type(e).__name__}: {e}"),
            "extraInfo": {"py_callstack": redacted(shown), "timestamp": str(int(time.time()))},
        }
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
