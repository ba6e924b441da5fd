"""Weights and checkpoints for tests, written without an engine: the real formats, made-up numbers."""

from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.parallel.fingerprint import fingerprint, fingerprint_text
from phi3v_dist.parallel.partitions import TensorSpec
from phi3v_dist.survive.manifest import FORMAT, FORMAT_VERSION, UPGRADE, rank_file_name, write_manifest
from phi3v_dist.survive.rank_files import write_rank_file


def trained_further(folder: Path) -> dict[str, Tensor]:
    """The parameters of the model in a folder, each a little off what is stored there."""
    tensors = load_file(folder / "model.safetensors")
    parameters = dict(Phi3VForCausalLM.from_pretrained(folder).named_parameters())
    return {name: tensors[name] + 0.01 for name in parameters}


class InMemory:
    """A dictionary of tensors as `Weights`."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.where, self.tensors = "memory", tensors

    @property
    def names(self) -> list[str]:
        return sorted(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


def write_checkpoint(
    run: Path, step: int, trained: dict[str, Tensor], frozen: dict[str, Tensor] | None = None, num_ranks: int = 2
) -> Path:
    """A committed checkpoint in a run folder, every tensor cut into as many pieces as there are ranks."""
    path = run / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    specs = {name: TensorSpec(tuple(t.shape), "trained", 0, {"weight": "float32"}) for name, t in trained.items()}
    for name, tensor in (frozen or {}).items():
        mark = fingerprint_text(fingerprint(tensor.flatten()))
        dtypes = {"weight": str(tensor.dtype).removeprefix("torch.")}
        specs[name] = TensorSpec(tuple(tensor.shape), "frozen", None, dtypes, mark)
    files = {}
    for rank in range(num_ranks):
        pieces, elements = {}, {}
        for name, tensor in trained.items():
            share = -(-tensor.numel() // num_ranks)
            piece = tensor.float().flatten()[rank * share : (rank + 1) * share].clone()
            pieces[name] = f"[{rank * share}, {len(piece)}]"
            elements[f"weight/{name}"] = piece
        text = "{" + ", ".join(f'"{name}": {piece}' for name, piece in pieces.items()) + "}"
        files[rank_file_name(rank)] = write_rank_file(path / rank_file_name(rank), elements, {"pieces": text})
    manifest = {
        "format": FORMAT, "version": FORMAT_VERSION, "upgrade": UPGRADE, "step": step, "files": files, "aliases": {},
        "tensors": {name: asdict(spec) for name, spec in specs.items()},
    }  # fmt: skip
    write_manifest(path, manifest)
    return path


def write_run(root: Path, tree: dict, name: str = "run") -> Path:
    """A run folder with its config.yaml and nothing else."""
    run = root / name
    run.mkdir(parents=True)
    recorded = tree | {"run": {"name": name, "root": str(root), "seed": 0}, "environment": {"commit": "unknown"}}
    (run / "config.yaml").write_text(yaml.safe_dump(recorded))
    return run
