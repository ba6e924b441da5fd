"""Words on their way out of this process → the same words with every credential replaced by `***`.

What comes in: log lines, tracebacks, settings, whatever is about to be written for people. What goes out: the text
without the values of environment variables whose names look secret (`WANDB_API_KEY`, `AWS_SECRET_ACCESS_KEY`, …) and
without the secret parts of addresses. Surprise: the values are looked up each time, because clients put keys into the
environment while a run goes on; and they are looked for as libraries write them too, quoted for an address or for JSON.
"""

import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any
from urllib.parse import quote

HIDDEN = "***"
LEAST_CHARS = 8  # of a value; a shorter one would be found in innocent words
LEAST_LINE_CHARS = 16  # of a line of a longer value, such as a private key

_SECRET_NAME = re.compile(
    r"(?:^|[_.-])(?:[A-Z0-9]*(?:KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASSWORT|CREDENTIALS?)|TOKEN|AUTH|PASS|PAT|SAS)"
    r"(?:$|[_.-])",
    re.IGNORECASE,
)
_NAMES_A_PLACE = re.compile(
    r"[_.-](?:PATH|FILE|DIR|FOLDER|HOME|SOCK|SOCKET|HOST|PORT|URL|URI|TYPE|NAME)$", re.IGNORECASE
)
_USER_IN_ADDRESS = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)[^\s/?#'\"]*@")
_IN_QUERY = re.compile(
    r"([?&;](?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|Signature|sig|AWSAccessKeyId|GoogleAccessId"
    r"|Key-Pair-Id|Policy|[a-z_-]*token|[a-z_-]*secret|[a-z_-]*password|(?:api|access|secret)?[_-]?key)=)[^&;\s#'\"<>\\]+",
    re.IGNORECASE,
)
_IN_HEADER = re.compile(
    r"(Authorization\W{1,4}(?:\w+\s+)?|\bBearer\s+(?=\S{16}))[A-Za-z0-9._~+/-]{8,}=*", re.IGNORECASE
)


def redacted(text: str) -> str:
    """`text` without credentials."""
    for value in _values():
        text = text.replace(value, HIDDEN)
    if "://" in text:
        text = _USER_IN_ADDRESS.sub(rf"\1{HIDDEN}@", text)
    if "=" in text:
        text = _IN_QUERY.sub(rf"\1{HIDDEN}", text)
    return _IN_HEADER.sub(rf"\1{HIDDEN}", text)


def redacted_tree(tree: Any) -> Any:
    """Settings as plain data, every text in them redacted; keys stay."""
    if isinstance(tree, dict):
        return {key: redacted_tree(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [redacted_tree(value) for value in tree]
    return redacted(tree) if isinstance(tree, str) else tree


def problems(tree: Any, key: str = "") -> list[str]:
    """A message for each setting that holds an address with a user or a password in it.

    A presigned address is allowed: its signature expires, and is redacted wherever the address is shown.
    """
    if isinstance(tree, dict):
        return [found for name, value in tree.items() for found in problems(value, f"{key}.{name}".lstrip("."))]
    if isinstance(tree, list):
        return [found for place, value in enumerate(tree) for found in problems(value, f"{key}.{place}")]
    if not isinstance(tree, str) or not _USER_IN_ADDRESS.search(tree):
        return []
    return [
        f"`{key}` is {redacted(tree)!r}: a password must not stand in a setting, which is written to many places. "
        "Take `…@` out of the address; for https put user and password into ~/.netrc (chmod 600), for s3 and gs into "
        "their environment variables or files"
    ]


def names(environment: os._Environ[str] | dict[str, str] = os.environ) -> list[str]:
    """Names of the environment variables whose values are kept back."""
    return [name for name, value in environment.items() if _is_secret(name, value)]


def _values() -> list[str]:
    """What must not be shown, in every spelling, the longest first: one may be a part of another."""
    values = {spelling for name in names() for spelling in _spellings(os.environ[name])}
    return sorted(values, key=len, reverse=True)


def _is_secret(name: str, value: str) -> bool:
    if len(value.strip()) < LEAST_CHARS or not _SECRET_NAME.search(name) or _NAMES_A_PLACE.search(name):
        return False
    return not (value.startswith(("/", "~", "./")) and os.path.exists(os.path.expanduser(value)))  # a file of secrets


def _spellings(value: str) -> Iterator[str]:
    value = value.strip()
    for part in (value, *(line.strip() for line in value.splitlines() if len(line.strip()) >= LEAST_LINE_CHARS)):
        yield from (part, quote(part), quote(part, safe=""), json.dumps(part)[1:-1], repr(part)[1:-1])


class RedactingStream:
    """stdout or stderr, with what is written by anybody redacted: prints, warnings, other libraries' loggers."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_process() -> None:
    """From now on nothing that Python prints in this process shows a credential, tracebacks of threads included."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, RedactingStream):
            setattr(sys, name, RedactingStream(stream))
    sys.excepthook = _report
    threading.excepthook = _report_of_thread


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As the interpreter's own hook, redacted as a whole: an error's words may be written in several pieces."""
    if sys.stderr is not None:
        sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))
        sys.stderr.flush()


def _report_of_thread(failure: threading.ExceptHookArgs) -> None:
    if failure.exc_type is SystemExit or failure.exc_value is None:
        return
    sys.stderr.write(f"Exception in thread {failure.thread.name if failure.thread else '?'}:\n")
    _report(failure.exc_type, failure.exc_value, failure.exc_traceback)
