"""A model of the Hugging Face hub → a folder with digests, so that compute nodes need no network.

What comes in: a repository's name, on a machine that reaches the hub. What goes out: its safetensors, JSON, tokenizer,
`*.py`, licence and model card in one folder, and `digests.json`: repository, commit, size and sha256 of every file.
Surprise: the client's word that all is there is not taken. It falls back to whatever an earlier attempt left, so sizes
are compared with the hub's list, and only then does the folder, `NAME.partial` until now, get its name. No pickle is
ever fetched.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from phi3v_dist.errors import CheckpointError
from phi3v_dist.invocation import as_typed
from phi3v_dist.progress import BYTES, show_progress, summed

DIGESTS_NAME = "digests.json"
MODEL_TYPE = "phi3_v"
PIECE_BYTES = 1 << 22  # read at once
LOOK_S = 0.5  # between looks at how much has arrived
WANTED = ("*.safetensors", "*.json", "tokenizer*", "*.py", "LICENSE*", "NOTICE*", "README*")  # of the top folder
LOADED = ("*.safetensors", "*.py")  # a file of these kinds that nobody listed would be read or run all the same

log = logging.getLogger(__name__)


class FileDigest(BaseModel):
    """One file as it was fetched; sha256 in hexadecimal."""

    size_bytes: int
    sha256: str


class Digests(BaseModel):
    """digests.json, format 1. To upgrade: fetch the folder again.

    revision: as it was asked for; commit: what that was at the time.
    """

    format: Literal[1] = 1
    repo: str
    revision: str
    commit: str
    files: dict[str, FileDigest]


def fetch(repo: str, out: Path, revision: str = "main", endpoint: str | None = None) -> Digests:
    """Fetch a Phi-3-V into the folder `out`, or verify it when it is there; returns what digests.json says.

    Interrupted, it goes on when called again.

    Args:
        revision: branch, tag or commit.
        endpoint: of the hub; None: HF_ENDPOINT, or the public one.

    Raises:
        CheckpointError: it cannot be reached, or is no Phi-3-V with safetensors; `out` holds something else; a file
            is not as the hub or digests.json says.
    """
    if (out / DIGESTS_NAME).exists():
        digests = read_digests(out)
        if digests.repo != repo or revision not in (digests.revision, digests.commit):
            raise CheckpointError(f"{out} holds {digests.repo} at {digests.revision}: name another --out")
        verify(out)
        return digests
    if out.exists():
        raise CheckpointError(f"{out} exists and has no {DIGESTS_NAME}: it is not ours to fill, name another --out")
    partial = out.with_name(f"{out.name}.partial")
    with _hub_errors(repo, revision):
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download

        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True)
        files = {f.rfilename: f for f in info.siblings or [] if _is_wanted(f.rfilename)}
        source: dict[str, Any] = {"revision": info.sha, "local_dir": partial, "endpoint": endpoint}
        if "config.json" in files:
            hf_hub_download(repo, "config.json", **source)
        _check_kind(repo, partial / "config.json", list(files))
        with _shown(f"downloading {repo}", partial, sum(file.size or 0 for file in files.values())):
            snapshot_download(repo, allow_patterns=list(files), **source)
    digests = Digests(repo=repo, revision=revision, commit=str(info.sha), files={})
    for name, file in sorted(files.items()):
        if not (partial / name).is_file() or (partial / name).stat().st_size != file.size:
            raise CheckpointError(f"{repo}: {name} did not arrive whole: run the same command again")
    for name, sha256 in _sha256(partial, sorted(files)):
        file = files[name]
        digests.files[name] = FileDigest(size_bytes=file.size, sha256=sha256)
        if file.lfs and file.lfs.sha256 != sha256:
            (partial / name).unlink()  # else it would be taken for the file the next time
            raise CheckpointError(f"{repo}: {name} arrived with other bytes: run the same command again")
    for path in partial.iterdir():  # the client's notes, and what an earlier commit had
        if path.name not in files:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (partial / DIGESTS_NAME).write_text(digests.model_dump_json(indent=2) + "\n")
    partial.rename(out)
    return digests


def verify(folder: Path) -> None:
    """Read every file again; CheckpointError naming each that is missing, other than fetched, or not listed."""
    listed = read_digests(folder).files
    problems = _wrong_sizes(folder, listed)
    for name, sha256 in _sha256(folder, [name for name in listed if name not in problems]):
        if sha256 != listed[name].sha256:
            problems[name] = "its bytes are not those that were fetched (sha256 differs)"
    present = sorted(path.name for kind in LOADED for path in folder.glob(kind))
    problems |= {name: f"not in {DIGESTS_NAME}" for name in present if name not in listed}
    _raise(folder, problems)


def check_sizes(folder: Path) -> None:
    """As `verify`, by sizes alone, which takes no time; nothing when the folder has no digests.json."""
    if (folder / DIGESTS_NAME).exists():
        _raise(folder, _wrong_sizes(folder, read_digests(folder).files))


def read_digests(folder: Path) -> Digests:
    """The content of digests.json; CheckpointError when there is none, or it is damaged."""
    path = folder / DIGESTS_NAME
    try:
        return Digests.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; {as_typed('launch/prepare.py')} weights writes it"
        ) from error
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is not what {as_typed('launch/prepare.py')} weights writes: fetch the folder again"
        ) from error


def _wrong_sizes(folder: Path, listed: dict[str, FileDigest]) -> dict[str, str]:
    problems = {}
    for name, digest in listed.items():
        if not (folder / name).is_file():
            problems[name] = "missing"
        elif (size_bytes := (folder / name).stat().st_size) != digest.size_bytes:
            problems[name] = f"has {size_bytes:,} bytes, fetched were {digest.size_bytes:,}"
    return problems


def _raise(folder: Path, problems: dict[str, str]) -> None:
    if problems:
        mend = "move the folder away and fetch it again"
        raise CheckpointError([f"{folder / name}: {problem}; {mend}" for name, problem in sorted(problems.items())])


def _is_wanted(name: str) -> bool:
    return "/" not in name and name != DIGESTS_NAME and any(fnmatch(name, pattern) for pattern in WANTED)


def _check_kind(repo: str, config: Path, names: list[str]) -> None:
    try:
        kind = json.loads(config.read_text())["model_type"] if config.is_file() else "no config.json"
    except (ValueError, KeyError, TypeError) as error:
        kind = f"a config.json that says nothing ({error!r})"
    if kind != MODEL_TYPE:
        shutil.rmtree(config.parent, ignore_errors=True)
        raise CheckpointError(f"{repo} is no Phi-3-vision: found {kind}, wanted model_type {MODEL_TYPE}")
    if not any(name.endswith(".safetensors") for name in names):
        shutil.rmtree(config.parent, ignore_errors=True)
        raise CheckpointError(f"{repo} has no safetensors; pickles (.bin, .pt) can run code when read: not fetched")


def _sha256(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and sha256 of each file."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    with show_progress(BYTES) as report:
        add = summed(report, f"reading {folder}", sum((folder / name).stat().st_size for name in names))
        for name in names:
            digest = hashlib.sha256()
            with (folder / name).open("rb", buffering=0) as file:
                while num_bytes := file.readinto(buffer):
                    digest.update(buffer[:num_bytes])
                    add(num_bytes)
            yield name, digest.hexdigest()


@contextmanager
def _shown(task: str, folder: Path, total_bytes: int) -> Iterator[None]:
    """Show how many bytes have arrived in a folder. The client's own bars are off: they would draw over ours."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled, is_over = are_progress_bars_disabled(), threading.Event()
    with show_progress(BYTES) as report:

        def look() -> None:
            while not is_over.wait(LOOK_S):
                report(task, min(_num_bytes(folder), total_bytes), total_bytes)

        looking = threading.Thread(target=look, name="download-progress", daemon=True)
        disable_progress_bars()
        looking.start()
        try:
            yield
            report(task, total_bytes, total_bytes)
        finally:
            is_over.set()
            looking.join()
            if not were_disabled:
                enable_progress_bars()


def _num_bytes(folder: Path) -> int:
    """What the files in a folder take on the disk; the client may make a file at its full size first."""
    size_bytes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed just now
            size_bytes += path.stat().st_blocks * 512
    return size_bytes


@contextmanager
def _hub_errors(repo: str, revision: str) -> Iterator[None]:
    """What the client raises → one line that says what to do."""
    from huggingface_hub import errors

    again = "run the same command again, it goes on where it stopped"
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{repo} is gated: accept its terms on the hub, then set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}: name a branch, a tag or a commit") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{repo}: no such model on the hub, or a private one that needs HF_TOKEN") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo!r} is no name of a model on the hub: wanted OWNER/NAME") from error
    except (errors.HTTPError, OSError) as error:
        why = str(error).strip().splitlines()
        raise CheckpointError(f"{repo} cannot be fetched: {why[0] if why else repr(error)}; {again}") from error
