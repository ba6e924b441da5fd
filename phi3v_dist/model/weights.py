"""Official safetensors → parameters, and parameters → official safetensors.

What comes in: a folder with `model.safetensors` or `model.safetensors.index.json` and its shards. What goes out: a
model whose every parameter was set, or one error that lists every name that did not fit. Surprise: tensors are read
one at a time, by rank 0, straight into ZeRO-3's partitions, so no rank ever holds a second copy of the model.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from phi3v_dist.errors import CheckpointError

EMBEDDING = "model.embed_tokens.weight"
EMBEDDING_ALIAS = "model.vision_embed_tokens.wte.weight"  # the same tensor under the image embedding's own name
TOWER = "model.vision_embed_tokens.img_processor.vision_model."
TOWER_LAYER = re.compile(re.escape(TOWER) + r"encoder\.layers\.(\d+)\.")
SHARD_SIZE_BYTES = 4 * 1024**3
INDEX_NAME = "model.safetensors.index.json"


class OfficialFolder:
    """The tensors of a model folder, by official name, read lazily.

    Raises:
        CheckpointError: there are no safetensors, or a file named by the index is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX_NAME
        if index.is_file():
            files = _files_of_index(index)
        else:
            single = folder / "model.safetensors"
            files = (
                [single.name] if single.is_file() else sorted(path.name for path in folder.glob("model*.safetensors"))
            )
        if not files:
            pickles = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt")])
            why = f"; {pickles[0]} is a pickle, which can run code when read: convert it first" if pickles else ""
            raise CheckpointError(f"{folder}: no model.safetensors and no {INDEX_NAME}{why}")
        self._file_of: dict[str, str] = {}
        for name in files:
            with self._open(name) as file:
                self._file_of |= dict.fromkeys(file.keys(), name)
        if EMBEDDING not in self._file_of and EMBEDDING_ALIAS in self._file_of:
            self._file_of[EMBEDDING] = self._file_of[EMBEDDING_ALIAS]
        self._file_of.pop(EMBEDDING_ALIAS, None)

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the language model's head, which every folder has."""
        return self.get("lm_head.weight").dtype if "lm_head.weight" in self._file_of else torch.float32

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        with self._open(self._file_of[name]) as file:
            return file.get_tensor(name if name in file.keys() else EMBEDDING_ALIAS)  # noqa: SIM118

    def shape(self, name: str) -> tuple[int, ...]:
        with self._open(self._file_of[name]) as file:
            return tuple(file.get_slice(name if name in file.keys() else EMBEDDING_ALIAS).get_shape())  # noqa: SIM118

    def _open(self, name: str) -> safe_open:
        path = self.folder / name
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error


def _files_of_index(path: Path) -> list[str]:
    try:
        return sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: no JSON with a `weight_map` from names to files ({error!r})") from error


def load_weights(model: nn.Module, weights: OfficialFolder, rank: int = 0) -> None:
    """Set every parameter of `model`, which may be partitioned by ZeRO-3 (then this is a collective call).

    Raises:
        CheckpointError: names or shapes do not fit; all of them are listed.
    """
    parameters = dict(model.named_parameters())
    check_names({name: tuple(_full_shape(p)) for name, p in parameters.items()}, weights)
    for name, parameter in parameters.items():
        with gathered(parameter, modify=True), torch.no_grad():
            if rank == 0:
                parameter.copy_(weights.get(name))


def check_names(shapes: dict[str, tuple[int, ...]], weights: OfficialFolder) -> None:
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
        if weights.shape(name) != shapes[name]:
            problems.append(f"{name}: shape {weights.shape(name)}, config.json says {shapes[name]}")
    if problems:
        raise CheckpointError([f"{weights.folder}: {problem}" for problem in problems])


def is_untrained(name: str) -> bool:
    """Tensors of an official folder that no forward reads: CLIP's last layer and norm, and its position buffer."""
    return name.startswith(TOWER) and (
        ".post_layernorm." in name or ".encoder.layers." in name or name.endswith("position_ids")
    )


def _tower_layer(name: str) -> int:
    """Number of the CLIP layer that a tensor belongs to; -1 for all others."""
    match = TOWER_LAYER.match(name)
    return int(match[1]) if match else -1


def gathered(parameter: nn.Parameter, modify: bool = False):  # type: ignore[no-untyped-def]
    """The whole parameter on every rank, for the length of a `with`; changes made by rank 0 are kept with `modify`."""
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter, modifier_rank=0 if modify else None)


def _full_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def write_safetensors(
    folder: Path, names: list[str], get: Callable[[str], Tensor], shard_size_bytes: int = SHARD_SIZE_BYTES
) -> None:
    """Write tensors by official name, one shard of memory at a time, with an index when there are several."""
    shards = list(_cut_into_shards(names, get, shard_size_bytes))
    total = 0
    weight_map: dict[str, str] = {}
    for number, shard_names in enumerate(shards, start=1):
        single = len(shards) == 1
        file_name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: get(name).contiguous() for name in shard_names}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        weight_map |= dict.fromkeys(shard_names, file_name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _cut_into_shards(names: list[str], get: Callable[[str], Tensor], limit_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size_bytes = 0
    for name in names:
        tensor = get(name)
        tensor_bytes = tensor.numel() * tensor.element_size()
        if shard and size_bytes + tensor_bytes > limit_bytes:
            yield shard
            shard, size_bytes = [], 0
        shard.append(name)
        size_bytes += tensor_bytes
    yield shard
