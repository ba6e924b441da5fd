"""The folders and shards that the settings name → what this node cannot read, write or hold.

What comes in: settings. What goes out: notes. Surprise: with 100,000 shards no node looks into all of them. Each lists
all and reads the beginnings of a few, which are others on every node.
"""

import hashlib
import math
import random
from pathlib import Path

from phi3v_dist.attempt.environment import why_not_writable
from phi3v_dist.cluster.checking import Notes, Place
from phi3v_dist.config import Settings
from phi3v_dist.data import patterns, store
from phi3v_dist.errors import CheckpointError, ConfigError, DataError
from phi3v_dist.model.adapters import part_of
from phi3v_dist.model.weights import OfficialFolder
from phi3v_dist.survive.retention import committed
from phi3v_dist.survive.space import free_bytes, size

BYTES_A_WEIGHT = 12  # of what is trained: fp32 master and Adam's two moments
WANTED_CHECKPOINTS = 2
SAMPLED_SHARDS = 16
HEAD_BYTES = 512  # of a tar
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")


def run_folder(place: Place, notes: Notes) -> None:
    folder = place.settings.run.folder
    notes.detail = f"{folder} can be written"
    if why := why_not_writable(folder):
        notes.problem(why)


def node_folders(place: Place, notes: Notes) -> None:
    """On the node's own disk, where the settings name any."""
    named = {
        "data.cache.path": ("the folder for copies of shards", place.settings.data.cache.path),
        "checkpoint.local": ("the folder for fast checkpoints", place.settings.checkpoint.local),
    }
    asked = {setting: (what, folder) for setting, (what, folder) in named.items() if folder is not None}
    notes.detail = ", ".join(f"{folder} can be written" for _, folder in asked.values()) or "none asked for"
    for setting, (what, folder) in asked.items():
        if why := why_not_writable(folder, what, setting):
            (notes.warn if setting == "data.cache.path" else notes.problem)(why)  # it trains without copies, too


def space(place: Place, notes: Notes) -> None:
    """Room for two checkpoints, those that are there counted, on shared storage and on the node's own."""
    whole = checkpoint_bytes(place.settings)
    folder, local = place.settings.run.folder, place.settings.checkpoint.local
    places = [("run.root", folder, whole, len(committed(folder / "checkpoints")))]
    if local is not None:
        places.append(("checkpoint.local", local, -(-whole // place.num_nodes), 0))
    details = []
    for setting, path, one, num_there in places:
        needed = max(1, WANTED_CHECKPOINTS - num_there) * one
        free = free_bytes(_existing(path))
        details.append(f"{size(free)} free for checkpoints of {size(one)}")
        if free < needed:
            notes.problem(
                f"{path} has {size(free)} free, and checkpoints of {size(one)} need {size(needed)}: free some, lower "
                f"checkpoint.keep, or set {setting} to another place"
            )
    notes.detail = "; ".join(details)


def shards(place: Place, notes: Notes) -> None:
    """Every named shard is there, as far as a listing says; a few can be read. Raises DataError."""
    sources = [*place.settings.data.train, *place.settings.data.validation]
    listings = patterns.Listings()
    found: list[str] = []
    for source in sources:
        its, problems = patterns.expand(source.shards, listings)
        found += its
        for problem in problems:
            notes.problem(problem)
    chosen = sample(found, place.host)
    for address in chosen:
        if why := _unreadable(address):
            notes.problem(why)
    notes.detail = f"{len(found):,} there, {len(chosen)} of them read"


def sample(addresses: list[str], host: str) -> list[str]:
    """At most 16, the same ones at each start of a node, others on the next node."""
    draw = random.Random(hashlib.sha256(host.encode()).digest())
    return draw.sample(addresses, min(SAMPLED_SHARDS, len(addresses)))


def model_folder(place: Place, notes: Notes) -> None:
    """Files of the tokenizer and weights can be opened and read. Raises CheckpointError."""
    path, init_from = place.settings.model.path, place.settings.model.init_from
    names = [path / name for name in TOKENIZER_FILES if name == "config.json" or (path / name).exists()]
    for file in [*names, *sorted(path.glob("*.safetensors"))]:
        try:
            with file.open("rb") as opened:
                empty = not opened.read(HEAD_BYTES)
        except OSError as error:
            notes.problem(f"`model.path`: {file} cannot be read: {error.strerror}")
            continue
        if empty:
            notes.problem(f"`model.path`: {file} is empty")
    if init_from is None and not notes.problems:
        OfficialFolder(path)
    notes.detail = f"{path} can be read"


def checkpoint_bytes(settings: Settings) -> int:
    """Of one checkpoint of these settings, from the headers of the model's files; 0 where there are none."""
    try:
        folder = OfficialFolder(settings.model.path)
    except (CheckpointError, OSError):
        return 0  # the look at the model folder says it, or the weights begin at random
    how = settings.train.parts.model_dump()
    weights = 0
    for name in folder.names:
        shape = folder.shape(name)
        if how[part_of(name)] == "full":
            weights += math.prod(shape)
        elif how[part_of(name)] == "lora" and len(shape) == 2:
            weights += settings.train.lora.rank * sum(shape)
    return weights * BYTES_A_WEIGHT


def _existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _unreadable(address: str) -> str | None:
    try:
        if store.is_remote(address):
            head = store.read(address, 0, HEAD_BYTES)
        else:
            with open(address, "rb") as file:
                head = file.read(HEAD_BYTES)
    except (OSError, DataError, ConfigError) as error:
        return f"{store.shown(address)}: cannot be read from this node: {store.shown_words(str(error))}"
    return None if head else f"{store.shown(address)}: is empty"
