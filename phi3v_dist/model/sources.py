"""Where weights come from: an official folder, a run's checkpoint, or chance. All are `Weights`.

What comes in: `model.path` and `model.init_from`. What goes out: something that gives every official tensor by name,
one at a time. Surprise: a checkpoint holds only what was trained. The rest (frozen parts, CLIP's layer that nobody
computes) is read from where that run began, which may be another run's checkpoint, and so on; fingerprints in the
checkpoint say whether it is still the same.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from phi3v_dist.config import LoraSettings
from phi3v_dist.errors import CheckpointError
from phi3v_dist.model.adapters import DOWN, UP, is_adapter, merged
from phi3v_dist.model.official_config import DEFAULT_PAD_ID, read_config
from phi3v_dist.model.origin import recorded_longrope
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.placement import PATCHES_PER_SIDE
from phi3v_dist.model.vision import CLIPEncoderLayer, clip_config
from phi3v_dist.model.weights import EMBEDDING, TOWER, OfficialFolder, Weights, is_untrained
from phi3v_dist.parallel.fingerprint import fingerprint, fingerprint_text
from phi3v_dist.survive.checkpoint import committed, read_tensors
from phi3v_dist.survive.manifest import MANIFEST
from phi3v_dist.survive.rank_files import TensorReader

RANDOM = "random"
CHECKPOINTS = "checkpoints"  # the folder of them in a run folder
INTO_RESIDUAL = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")
RESIDUAL_SCALE = 0.3  # layers begin as small changes to what passes by them


def initial_weights(
    path: Path, init_from: str | None, seed: int, moved_to: Path | None = None, verify: bool = False
) -> Weights:
    """The weights that a run begins with.

    Args:
        path: `model.path`.
        init_from: `model.init_from`.
        seed: for `random`.
        moved_to: where the model folder of all earlier runs is now, if it is not where they found it.
        verify: read every byte of a checkpoint first.

    Raises:
        CheckpointError: there are none, or they cannot be read.
    """
    if init_from is None:
        return OfficialFolder(path)
    if init_from == RANDOM:
        return RandomWeights(read_config(path), seed)
    folder = Path(pinned(init_from))
    if (folder / MANIFEST).is_file():
        return TrainedWeights.open(folder, moved_to, verify)
    if not folder.is_dir():
        raise CheckpointError(
            f"`model.init_from` {folder}: no such folder; a run, a checkpoint, a model folder, or random"
        )
    return OfficialFolder(folder)


def pinned(init_from: str) -> str:
    """`model.init_from`, a run's folder replaced by its newest checkpoint, so that it means the same ever after.

    Raises:
        CheckpointError: the run has no checkpoint yet.
    """
    folder = Path(init_from) / CHECKPOINTS
    if init_from == RANDOM or not folder.is_dir():
        return init_from
    checkpoints = committed(folder)
    if not checkpoints:
        raise CheckpointError(f"`model.init_from` {init_from}: no checkpoint in it yet")
    return str(checkpoints[0])


def trained_rule(path: Path, init_from: str | None) -> str:
    """The LongRoPE rule under which the weights that a run begins with were trained."""
    if init_from in (None, RANDOM):
        return recorded_longrope(path)
    folder = Path(pinned(str(init_from)))
    return (
        str(_settings_of(folder)["model"]["longrope"]) if (folder / MANIFEST).is_file() else recorded_longrope(folder)
    )


def recorded_settings(path: Path) -> dict[str, Any]:
    """A run's config.yaml; settings of the model that it does not know yet have their defaults.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        tree = yaml.safe_load(path.read_text())
        return tree | {"model": {"longrope": "document", "init_from": None} | tree["model"]}
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error!r}), so nothing says which model this run began with: restore the file"
        ) from error


def _settings_of(checkpoint: Path) -> dict[str, Any]:
    return recorded_settings(checkpoint.parent.parent / "config.yaml")


class RandomWeights:
    """A model's tensors from its config.json and a seed, each by itself, so that any rank can make any of them.

    Matrices have the variance that keeps a signal's size (1 / inputs), less at the end of a layer; biases are 0.
    """

    def __init__(self, config: dict[str, Any], seed: int):
        self.where = f"random weights, seed {seed}"
        self._config, self._seed = config, seed
        self._dtype: torch.dtype = getattr(torch, config.get("torch_dtype") or "float32")
        model = Phi3VForCausalLM.without_weights(config)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        clip = clip_config(config)
        with torch.device("meta"):
            last = CLIPEncoderLayer(clip), torch.nn.LayerNorm(clip.hidden_size)
        for prefix, module in zip(
            (f"encoder.layers.{clip.num_hidden_layers - 1}", "post_layernorm"), last, strict=True
        ):
            self._shapes |= {f"{TOWER}{prefix}.{name}": tuple(p.shape) for name, p in module.named_parameters()}

    @property
    def names(self) -> list[str]:
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def get(self, name: str) -> Tensor:
        shape = self._shapes[name]
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        if name.endswith("position_embedding.weight"):
            return _grid_waves(*shape).to(self._dtype)
        if len(shape) == 1 and not name.endswith("class_embedding"):
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=self._dtype)
        tensor = torch.randn(shape, generator=generator)
        if name == EMBEDDING:
            pad_id = self._config.get("pad_token_id", DEFAULT_PAD_ID)
            if pad_id is not None:
                tensor[pad_id] = 0
            tensor *= 0.5  # of the size of the pictures' features, which stand beside it
        elif name.endswith(("_GN", "class_embedding")):
            tensor *= 0.02
        else:
            scale = RESIDUAL_SCALE if name.endswith(INTO_RESIDUAL) else 1.0
            tensor *= scale * tensor[0].numel() ** -0.5
        return tensor.to(self._dtype)


def _grid_waves(num_positions: int, width: int) -> Tensor:
    """Class token, then patches row by row: sines and cosines of row and column (Vaswani et al., 2017, in two axes).

    From noise, a small tower would first have to find out which patches are neighbours.
    """
    side = torch.arange(PATCHES_PER_SIDE).float()
    frequencies = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    waves = torch.cat([(side[:, None] * frequencies).sin(), (side[:, None] * frequencies).cos()], dim=1)
    rows, columns = torch.meshgrid(torch.arange(len(side)), torch.arange(len(side)), indexing="ij")
    grid = torch.cat([waves[rows.flatten()], waves[columns.flatten()]], dim=1)
    return torch.cat([torch.zeros(num_positions - len(grid), grid.shape[1]), grid])


class TrainedWeights:
    """A checkpoint's weights, adapters merged, completed by those that its run began with and in their types.

    adapters: the checkpoint's own low-rank tensors, name → tensor; empty for a run without LoRA.
    in_full: names of trained tensors that are no adapters.

    Raises:
        CheckpointError: the two do not belong together; every name is listed. `get` raises it for a frozen tensor that
            is not what it was.
    """

    def __init__(self, checkpoint: TensorReader, base: Weights, lora: LoraSettings):
        self.checkpoint, self.base, self.lora, self.where = checkpoint, base, lora, str(checkpoint.path)
        roles = {name: spec.role for name, spec in checkpoint.specs.items()}
        self.in_full = [name for name, role in roles.items() if role == "trained" and not is_adapter(name)]
        known = {name for name, role in roles.items() if role != "buffer" and not is_adapter(name)}
        problems = [
            f"{self.where} does not hold {name} of {base.where}"
            for name in base.names
            if name not in known and not is_untrained(name)
        ]
        problems += [
            f"{self.where} holds {name}, which {base.where} does not know" for name in sorted(known - set(base.names))
        ]
        if problems:
            raise CheckpointError(problems)

    @classmethod
    def open(cls, path: Path, moved_to: Path | None = None, verify: bool = False) -> "TrainedWeights":
        """Of a committed checkpoint in a run folder, whose config.yaml says where the run began."""
        tree = _settings_of(path)
        checkpoint = read_tensors(path) if verify else TensorReader(path)
        model = tree["model"]
        base = initial_weights(
            moved_to or Path(model["path"]), model["init_from"], tree["run"]["seed"], moved_to, verify
        )
        return cls(checkpoint, base, LoraSettings(**tree["train"].get("lora", {})))

    @property
    def names(self) -> list[str]:
        return self.base.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    @cached_property
    def adapters(self) -> dict[str, Tensor]:
        return {name: self.checkpoint.get(name) for name in self.checkpoint.names if is_adapter(name)}

    def get(self, name: str) -> Tensor:
        spec = self.checkpoint.specs.get(name)
        tensor = self.base.get(name) if spec is None or spec.role == "frozen" else self.checkpoint.stored(name)
        if spec is not None and spec.role == "frozen":
            self._require_unchanged(name, tensor)
        module = name.removesuffix(".weight")
        if module + UP in self.adapters:
            up, down = self.adapters[module + UP], self.adapters[module + DOWN]
            tensor = merged(tensor.float(), up, down, self.lora.alpha / len(down))
        return tensor.to(self.dtype(name))

    def _require_unchanged(self, name: str, tensor: Tensor) -> None:
        spec = self.checkpoint.specs[name]
        computed = tensor.to(getattr(torch, spec.dtypes["weight"])).flatten()
        found = fingerprint_text(fingerprint(computed))
        if found != spec.fingerprint:
            raise CheckpointError(
                f"{self.where} was trained with another {name} than {self.base.where} has (fingerprint "
                f"{spec.fingerprint}, now {found}): restore that folder, or name the right one"
            )

    def describe(self) -> dict[str, Any]:
        """Which checkpoint this is, for records: run, step, and the manifest's checksum."""
        manifest = json.loads((self.checkpoint.path / MANIFEST).read_text())
        run = self.checkpoint.path.resolve().parent.parent.name
        return {"run": run, "step": manifest["step"], "checkpoint": self.checkpoint.path.name,
                "manifest": manifest["checksum"]}  # fmt: skip
