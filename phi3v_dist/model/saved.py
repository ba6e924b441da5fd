"""A folder that holds a model, of whatever kind → its tensors by official name, and how the model is to be used.

What comes in: a published or exported model folder, an adapter exported alone, a run folder, or one of its checkpoints.
What goes out: a `SavedModel`. Surprise: nothing is unpickled and no process group is needed. A run means its newest
checkpoint whose every byte is as it was written; one that is damaged is named in the log and passed over.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from phi3v_dist.errors import CheckpointError
from phi3v_dist.model.adapters import merged
from phi3v_dist.model.backends import Backend
from phi3v_dist.model.official_config import read_config
from phi3v_dist.model.origin import ORIGIN_NAME, recorded_longrope
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.sources import CHECKPOINTS, TrainedWeights, recorded_settings
from phi3v_dist.model.weights import OfficialFolder, Weights
from phi3v_dist.survive.checkpoint import Checkpoints, committed
from phi3v_dist.survive.manifest import MANIFEST

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What peft may say of an adapter that is more than weight + lora_alpha / r · B A.
NOT_PLAIN = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "modules_to_save")
WANTED = "a model folder, an export, a run folder or one of its checkpoints is wanted"


@dataclass(frozen=True)
class SavedModel:
    """
    name: for records of it: the model folder's own, or `checkpoint-…` with the step.
    files: folder with config.json and what the processor reads.
    longrope: the rule it was trained under.
    num_crops: local crops a picture that it was trained with; None: those that the files say.
    run: the run folder of which it is a checkpoint, or in which it lies as an export; None: neither.
    """

    name: str
    weights: Weights
    files: Path
    longrope: str
    num_crops: int | None
    run: Path | None

    @classmethod
    def open(cls, folder: Path, base: Path | None = None) -> "SavedModel":
        """Find out what the folder is; tensors are read by `load`.

        base: the model folder that a run or an adapter began with, if it moved.

        Raises:
            CheckpointError: it is no model, or one that is not whole.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; {WANTED}")
        if (folder / MANIFEST).is_file():
            return cls._of_checkpoint(folder, base, verify=True)
        if (folder / CHECKPOINTS).is_dir():
            newest = Checkpoints(folder / CHECKPOINTS, keep=1).newest()
            if newest is None:
                raise CheckpointError(f"{folder}: this run has no checkpoint yet")
            return cls._of_checkpoint(newest, base, verify=False)  # every byte of it was read just now
        weights: Weights
        if (folder / ADAPTER_CONFIG).is_file() and not list(folder.glob("model*.safetensors")):
            adapted = AdaptedWeights.open(folder, base)
            weights, files = adapted, adapted.base.folder
        elif (folder / "config.json").is_file() or list(folder.glob("model*.safetensors")):
            weights, files = OfficialFolder(folder), folder
        else:
            inside = " (the checkpoints of a run are in it: name the run, or one of them)" if committed(folder) else ""
            raise CheckpointError(f"{folder}: holds no model{inside}; {WANTED}")
        run = folder.resolve().parent
        in_run = (folder / ORIGIN_NAME).is_file() and (run / "config.yaml").is_file()
        return cls(folder.resolve().name, weights, files, recorded_longrope(folder), None, run if in_run else None)

    @classmethod
    def _of_checkpoint(cls, path: Path, base: Path | None, verify: bool) -> "SavedModel":
        run = path.resolve().parent.parent
        tree = recorded_settings(run / "config.yaml")
        files = base or Path(tree["model"]["path"])
        if not files.is_dir():
            raise CheckpointError(
                f"{path}: its run began with the model folder {files}, which is not there: say with --base where it is"
            )
        weights = TrainedWeights.open(path, base, verify)
        name = path.name.replace("step", "checkpoint")  # `eval/step-…` is what a run itself evaluated
        return cls(name, weights, files, tree["model"]["longrope"], tree.get("data", {}).get("num_crops"), run)

    def load(
        self, longrope: str | None = None, attention: str | Backend = "auto", dtype: torch.dtype | None = None
    ) -> Phi3VForCausalLM:
        """The model, as `Phi3VForCausalLM.from_pretrained` gives that of a model folder."""
        return Phi3VForCausalLM.of(read_config(self.files), self.weights, longrope or self.longrope, attention, dtype)


class AdaptedWeights:
    """A model folder's weights with peft's adapter added in, in the folder's types."""

    def __init__(self, base: OfficialFolder, scaling: float, pairs: dict[str, tuple[Tensor, Tensor]], where: str):
        """pairs: weight's name → its low-rank matrices A and B."""
        self.base, self.where = base, where
        self._scaling, self._pairs = scaling, pairs
        problems = [f"{where}: adapts {name}, which {base.where} has not" for name in pairs if name not in base.names]
        for name, (down, up) in pairs.items():
            if name in base.names and (len(up), down.shape[1]) != base.shape(name):
                problems.append(f"{where}: its matrices for {name} do not give {base.shape(name)}")
        if problems:
            raise CheckpointError(problems)

    @classmethod
    def open(cls, folder: Path, base: Path | None = None) -> "AdaptedWeights":
        """Raises CheckpointError: the adapter is damaged, more than a plain LoRA, or its base is not there."""
        path = folder / ADAPTER_CONFIG
        try:
            config: dict[str, Any] = json.loads(path.read_text())
            scaling = config["lora_alpha"] / config["r"]
            files = base or Path(config["base_model_name_or_path"])
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(f"{path}: not the settings of a LoRA adapter ({error!r})") from error
        unknown = [key for key in NOT_PLAIN if config.get(key)] + ["bias"] * (config.get("bias", "none") != "none")
        if unknown:
            raise CheckpointError(f"{path}: {', '.join(unknown)} is set; only a plain LoRA can be added in here")
        if not files.is_dir():
            raise CheckpointError(
                f"{path}: the adapter stands on {files}, which is no folder: say with --base where it is"
            )
        try:
            stored = load_file(folder / ADAPTER_WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / ADAPTER_WEIGHTS} cannot be read: {error}") from error
        tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in stored.items()}
        down, up = ".lora_A.weight", ".lora_B.weight"
        modules = {name.removesuffix(down).removesuffix(up) for name in tensors}
        if missing := [name for module in modules for name in (module + down, module + up) if name not in tensors]:
            raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: not a plain LoRA: {min(missing)} is not in it")
        pairs = {f"{module}.weight": (tensors[module + down], tensors[module + up]) for module in sorted(modules)}
        return cls(OfficialFolder(files), scaling, pairs, str(folder))

    @property
    def names(self) -> list[str]:
        return self.base.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def get(self, name: str) -> Tensor:
        if name not in self._pairs:
            return self.base.get(name)
        down, up = self._pairs[name]
        return merged(self.base.get(name).float(), up, down, self._scaling).to(self.dtype(name))
