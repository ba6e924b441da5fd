"""The files of a DeepSpeed ZeRO-3 checkpoint → tensors by rank and official name; nothing in them is run.

What comes in: the folder that `engine.save_checkpoint` wrote. What goes out: a `DeepSpeedCheckpoint`, whose tensors are
mapped into memory.

Surprise: these files are pickles, which may run anything when they are read. `_Unpickler` rebuilds tensors and plain
containers and nothing else; whatever else a file names becomes an object that does nothing, so that the loss scaler
beside the tensors does not stop the import (`torch.load(weights_only=True)` refuses such files altogether).
"""

import collections
import logging
import pickle
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi3v_dist import versions
from phi3v_dist.errors import CheckpointError
from phi3v_dist.parallel.fingerprint import fingerprint, fingerprint_text
from phi3v_dist.parallel.partitions import official_name
from phi3v_dist.survive.manifest import MANIFEST
from phi3v_dist.survive.retention import committed

log = logging.getLogger(__name__)

MODEL_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def _without_attributes(rebuild: Any, kind: Any, arguments: tuple[Any, ...], attributes: Any) -> Any:
    """A tensor on which python attributes were set, which training does not need. `rebuild`: what the file may call."""
    return rebuild(*arguments)


def _plain(data: Any, *arguments: Any) -> Any:
    """A parameter as the tensor that it is."""
    return data


REBUILDS = {  # all that a file may call
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _plain,
    ("torch._utils", "_rebuild_parameter_with_state"): _plain,
    ("torch._tensor", "_rebuild_from_type_v2"): _without_attributes,
}
OTHER_WAY = "With DeepSpeed's own zero_to_fp32.py its weights can be had, to begin from (`model.init_from`)"


class Inert:
    """Stands for an object that a file wants to be made: keeps the arguments, does nothing."""

    arguments: tuple[Any, ...] = ()

    def __new__(cls, *arguments: Any, **named: Any) -> "Inert":
        inert = super().__new__(cls)
        inert.arguments = arguments
        return inert

    def __init__(self, *arguments: Any, **named: Any):
        pass

    def _ignore(self, *arguments: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The object itself only if it is listed above, or a type of elements such as torch.bfloat16."""
        if (module, name) in REBUILDS:
            return REBUILDS[module, name]
        dtype = getattr(torch, name, None) if module == "torch" and "." not in name else None
        return dtype if isinstance(dtype, torch.dtype) else type(name, (Inert,), {})


def read_inert(path: Path) -> Any:
    """What `torch.save` wrote: tensors mapped into memory, in plain containers. Raises CheckpointError."""
    try:
        path.open("rb").close()  # torch's reader does not say why a file cannot be opened
        # torch.load would hand an archive of TorchScript to another reader, which no unpickler of ours sees.
        if any(record.endswith("constants.pkl") for record in torch._C.PyTorchFileReader(str(path)).get_all_records()):
            raise CheckpointError(f"{path} is a TorchScript archive, not a checkpoint")
        module = types.SimpleNamespace(Unpickler=_Unpickler, __name__="inert")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=module)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # bytes from elsewhere can make a reader of pickles raise anything
        raise CheckpointError(
            f"{path} cannot be read: it is cut off, damaged, or was not written by torch.save of torch 1.6 or later"
        ) from error


@dataclass(frozen=True)
class DeepSpeedCheckpoint:
    """The files of one ZeRO-3 checkpoint, by rank. `head`: what all model files say alike; tensors of rank 0."""

    folder: Path
    model_files: list[Path]
    optimizer_files: list[Path]
    head: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path, tag: str | None = None) -> "DeepSpeedCheckpoint":
        """folder: what was given to `save_checkpoint`, or the `global_step…` in it. Raises CheckpointError."""
        folder = _tagged(folder, tag)
        model_files, optimizer_files = _by_rank(folder, MODEL_FILE), _by_rank(folder, OPTIMIZER_FILE)
        if not model_files:
            raise CheckpointError(
                f"{folder} holds no ZeRO-3 checkpoint: no zero_pp_rank_0_mp_rank_00_model_states.pt. That of another "
                f"ZeRO stage cannot be imported. {OTHER_WAY}"
            )
        head = read_inert(model_files[min(model_files)])
        try:
            world_size = int(head["dp_world_size"])
            if head["mp_world_size"] != 1:
                raise CheckpointError(f"{folder} was saved with tensor parallelism, which is not imported. {OTHER_WAY}")
            head["param_shapes"][0].items()
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise CheckpointError(
                f"{folder} does not say what it holds ({error!r}): not a ZeRO-3 checkpoint"
            ) from error
        writer = str(head.get("ds_version"))
        if not versions.accepts("deepspeed", writer):
            log.warning(
                "%s was saved by DeepSpeed %s; importing is tested with files of deepspeed%s",
                folder, writer, versions.ACCEPTED["deepspeed"],
            )  # fmt: skip
        missing = [
            f"{folder}: {what} of rank {rank} is missing; it was saved by {world_size} ranks and all of their files "
            "are needed"
            for what, files in (("model_states.pt", model_files), ("optim_states.pt", optimizer_files))
            for rank in range(world_size)
            if rank not in files
        ]
        if missing:
            raise CheckpointError(missing)
        ranks = range(world_size)
        return cls(folder, [model_files[rank] for rank in ranks], [optimizer_files[rank] for rank in ranks], head)

    @property
    def world_size(self) -> int:
        return len(self.model_files)

    @property
    def sub_groups(self) -> list[dict[str, tuple[int, ...]]]:
        """Trained tensors in the order of each flat group: official name → shape."""
        return [
            {_official(name): tuple(shape) for name, shape in shapes.items()} for shapes in self.head["param_shapes"]
        ]

    @property
    def frozen(self) -> dict[str, tuple[int, ...]]:
        return {_official(name): tuple(shape) for name, shape in (self.head.get("frozen_param_shapes") or {}).items()}

    def frozen_fingerprints(self) -> dict[str, tuple[str, str]]:
        """Official name → element type and fingerprint of the frozen weights that the checkpoint holds."""
        totals: dict[str, Tensor] = {}
        dtypes: dict[str, str] = {}
        for rank, path in enumerate(self.model_files):
            for stored_name, fragment in (read_inert(path).get("frozen_param_fragments") or {}).items():
                name = _official(stored_name)
                start, length = owned_of(self.frozen[name], rank, self.world_size)
                total = fingerprint(fragment.detach().flatten()[:length], start)
                totals[name] = totals.get(name, torch.zeros((), dtype=torch.int64)) + total
                dtypes[name] = str(fragment.dtype).removeprefix("torch.")
        return {name: (dtypes[name], fingerprint_text(total)) for name, total in totals.items()}

    def states(self, rank: int) -> list[dict[str, Any]]:
        """For each flat group of a rank: `weight`, the fp32 masters, and the optimizer's states beside them."""
        path = self.optimizer_files[rank]
        try:
            optimizer = read_inert(path)["optimizer_state_dict"]
            flats, states = optimizer["fp32_flat_groups"], optimizer["optimizer_state_dict"]["state"]
            found = [{"weight": flat.detach(), **states.get(number, {})} for number, flat in enumerate(flats)]
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} holds no optimizer of ZeRO-3 ({error!r})") from error
        held = [group["weight"].numel() for group in found]
        needed = [sum(share_of(shape, self.world_size) for shape in group.values()) for group in self.sub_groups]
        if held != needed:
            raise CheckpointError(f"{path} holds groups of {held} elements, but the names beside it stand for {needed}")
        return found


def _tagged(folder: Path, tag: str | None) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: {'that is a file' if folder.exists() else 'there is no such folder'}")
    if _has_model_files(folder):
        return folder
    if ours := _in_our_format(folder):
        raise CheckpointError(
            f"{folder} is no DeepSpeed checkpoint: {ours} is in this program's own format and needs no import. The "
            f"same command goes on with its run; model.init_from={ours} begins another one with its weights"
        )
    latest = folder / "latest"
    if tag is None and not latest.is_file():
        raise CheckpointError(
            f"{folder} is no DeepSpeed checkpoint: it has neither `latest` nor zero_pp_rank_…_model_states.pt; name "
            "the folder that was given to save_checkpoint, or the global_step… in it"
        )
    tag = latest.read_text().strip() if tag is None else tag
    if not tag or Path(tag).name != tag or not (folder / tag).is_dir():
        tags = sorted(path.name for path in folder.iterdir() if path.is_dir() and _has_model_files(path))
        raise CheckpointError(f"{folder}: there is no checkpoint {tag!r} in it; there is {', '.join(tags) or 'none'}")
    return folder / tag


def _has_model_files(folder: Path) -> bool:
    return any(MODEL_FILE.fullmatch(path.name) for path in folder.iterdir())


def _in_our_format(folder: Path) -> Path | None:
    """A checkpoint of ours: this folder, or the newest in it or in the run folder that it is."""
    if (folder / MANIFEST).is_file():
        return folder
    found = [path for place in (folder, folder / "checkpoints") for path in committed(place)]
    return next((path for path in found if (path / MANIFEST).is_file()), None)


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    found = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(name.group(1)): path for name, path in found if name and int(name.group(2)) == 0}


def _official(name: str) -> str:
    return official_name(name.removeprefix("module."))


def share_of(shape: tuple[int, ...], world_size: int) -> int:
    return -(-torch.Size(shape).numel() // world_size)


def owned_of(shape: tuple[int, ...], rank: int, world_size: int) -> tuple[int, int]:
    """Start and length of a rank's elements of a flattened tensor."""
    numel, share = torch.Size(shape).numel(), share_of(shape, world_size)
    start = min(rank * share, numel)
    return start, min(share, numel - start)
