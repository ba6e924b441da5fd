"""Official tensors by name → parameters, and → official safetensors.

What comes in: `Weights`, anything that gives tensors by official name one at a time (here: a folder with
`model.safetensors` or `model.safetensors.index.json` and its shards; others in sources.py). What goes out: a model
whose every parameter was set, or one error that lists every name that did not fit. Surprise: every rank maps the files
into memory and copies only its own ZeRO-3 partition, so nothing travels between ranks and no rank ever holds the model.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Protocol, runtime_checkable

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from phi3v_dist.errors import CheckpointError
from phi3v_dist.parallel.partitions import full_shape, is_partitioned, set_partition
from phi3v_dist.progress import track
from phi3v_dist.survive.durable import fsync_folder, write_durably
from phi3v_dist.survive.tensor_file import TORCH_DTYPES, blocks, size_bytes
from phi3v_dist.watch import heartbeat

EMBEDDING = "model.embed_tokens.weight"
EMBEDDING_ALIAS = "model.vision_embed_tokens.wte.weight"  # the same tensor under the image embedding's own name
TOWER = "model.vision_embed_tokens.img_processor.vision_model."
TOWER_LAYER = re.compile(re.escape(TOWER) + r"encoder\.layers\.(\d+)\.")
SHARD_SIZE_BYTES = 4 * 1024**3
FILE_PATTERN = "model{suffix}.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@runtime_checkable
class Weights(Protocol):
    """Tensors of a model by official name. What `get` gives may be mapped from a file: it is for reading only.

    where: what to call this source in a message.
    """

    where: str

    @property
    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def get(self, name: str) -> Tensor: ...


class OfficialFolder:
    """The tensors of a model folder, by official name, read lazily.

    Raises:
        CheckpointError: there are no safetensors, or a file named by the index is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.where = folder, str(folder)
        index = folder / INDEX_NAME
        single = folder / "model.safetensors"
        if index.is_file():
            files = _files_of_index(index)
        elif single.is_file():
            files = [single.name]
        else:
            files = sorted(path.name for path in folder.glob("model*.safetensors"))
        if not files:
            pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
            why = f"; {_refusal(pickles[0])}" if pickles else ""
            if (folder / "adapter_config.json").is_file():
                why = "; it is an adapter alone: name its run, or export that with --merge"
            raise CheckpointError(f"{folder}: no model.safetensors and no {INDEX_NAME}{why}")
        self._files = {name: _open(folder / name) for name in files}
        self._file_of: dict[str, str] = {}
        for file_name, file in self._files.items():
            for name in file.keys():  # noqa: SIM118
                if name in self._file_of:
                    twice = f"{self._file_of[name]} and {file_name}"
                    raise CheckpointError(f"{folder}: {name} is in {twice}; remove the files of another model")
                self._file_of[name] = file_name
        if EMBEDDING not in self._file_of and EMBEDDING_ALIAS in self._file_of:
            self._file_of[EMBEDDING] = self._file_of[EMBEDDING_ALIAS]
        self._file_of.pop(EMBEDDING_ALIAS, None)

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._slice(name).get_dtype()
        if stored not in TORCH_DTYPES:
            raise CheckpointError(
                f"{self._path(name)}: {name} is stored as {stored}; known are {', '.join(TORCH_DTYPES)}"
            )
        return TORCH_DTYPES[stored]

    def get(self, name: str) -> Tensor:
        """One tensor, mapped from the file: a page is read when one of its elements is."""
        file = self._files[self._file_of[name]]
        return file.get_tensor(name if name in file.keys() else EMBEDDING_ALIAS)  # noqa: SIM118

    def _slice(self, name: str):  # type: ignore[no-untyped-def]
        file = self._files[self._file_of[name]]
        return file.get_slice(name if name in file.keys() else EMBEDDING_ALIAS)  # noqa: SIM118

    def _path(self, name: str) -> Path:
        return self.folder / self._file_of[name]


def _open(path: Path) -> safe_open:
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path.parent / INDEX_NAME}: {_refusal(path.name)}")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error


def _refusal(name: str) -> str:
    return f"{name} is no safetensors file; a pickle can run code when it is read, so convert it first"


def _files_of_index(path: Path) -> list[str]:
    try:
        files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        strangers = [name for name in files if PurePosixPath(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no JSON with a `weight_map` from names to files ({error!r})") from error
    if strangers:
        raise CheckpointError(f"{path}: names files outside of its folder: {', '.join(strangers)}")
    return files


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Set every parameter of `model`; of a partitioned one, this rank's share. No communication.

    Raises:
        CheckpointError: names or shapes do not fit; all of them are listed.
    """
    parameters = dict(model.named_parameters())
    check_names({name: full_shape(parameter) for name, parameter in parameters.items()}, weights)
    for name in track(parameters, f"reading {weights.where}", "tensors"):
        heartbeat.beat(name)
        if is_partitioned(parameters[name]):
            set_partition(parameters[name], weights.get(name))
        else:
            parameters[name].copy_(weights.get(name))


def check_names(shapes: dict[str, tuple[int, ...]], weights: Weights) -> None:
    """Compare the model's names and shapes with the folder's; tensors that are never computed may be extra."""
    found = set(weights.names)
    problems = [f"{name}: missing" for name in sorted(shapes.keys() - found)]
    num_layers = 1 + max((_tower_layer(name) for name in shapes), default=-1)
    problems += [
        f"{name}: not a part of this model"
        for name in sorted(found - shapes.keys())
        if not is_untrained(name) or _tower_layer(name) not in (-1, num_layers)
    ]
    for name in sorted(shapes.keys() & found):
        if not weights.dtype(name).is_floating_point:
            problems.append(f"{name}: stored as {weights.dtype(name)}; quantised weights cannot be trained")
        elif weights.shape(name) != shapes[name]:
            problems.append(f"{name}: shape {weights.shape(name)}, config.json says {shapes[name]}")
    if problems:
        raise CheckpointError([f"{weights.where}: {problem}" for problem in problems])


def is_untrained(name: str) -> bool:
    """Tensors of an official folder that no forward reads: CLIP's last layer and norm, and its position buffer."""
    return name.startswith(TOWER) and (
        ".post_layernorm." in name or ".encoder.layers." in name or name.endswith("position_ids")
    )


def _tower_layer(name: str) -> int:
    """Number of the CLIP layer that a tensor belongs to; -1 for all others."""
    match = TOWER_LAYER.match(name)
    return int(match[1]) if match else -1


def write_safetensors(
    folder: Path,
    weights: Weights,
    on_progress: Callable[[int, int], None] | None = None,
    shard_size_bytes: int = SHARD_SIZE_BYTES,
) -> None:
    """Write all tensors, one in memory at a time, with an index when there are several files; flushed to the disk.

    Args:
        on_progress: told (tensors done, tensors in all).
    """
    specs = {name: (weights.shape(name), weights.dtype(name)) for name in weights.names}
    num_done = 0

    def get(name: str) -> Tensor:
        nonlocal num_done
        if on_progress:
            on_progress(num_done, len(specs))
        num_done += 1
        return weights.get(name)

    split = split_state_dict_into_shards_factory(
        specs,
        get_storage_size=lambda spec: size_bytes(*spec),
        filename_pattern=FILE_PATTERN,
        max_shard_size=shard_size_bytes,
    )

    for file_name, names in split.filename_to_tensors.items():
        heartbeat.beat(file_name)
        with (folder / file_name).open("wb") as file:
            for block in blocks({name: specs[name] for name in names}, get, {"format": "pt"}):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())

    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_durably(folder / INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")
    fsync_folder(folder)
