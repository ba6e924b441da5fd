"""A checkpoint → a folder that others open.

What comes in: a committed checkpoint in its run folder. What goes out: official safetensors, config and tokenizer files
and a model card; or, of a LoRA run, peft's adapter folder. Surprise: nothing here ever holds the model. Tensors pass
one by one, and the probe runs through a model whose modules fetch their weights when they are called, so the real model
is exported and checked in less than 2 GB.
"""

import functools
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from phi3v_dist.config import Settings
from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.errors import CheckpointError
from phi3v_dist.memory import returned_when_freed
from phi3v_dist.model.adapters import write_adapter
from phi3v_dist.model.card import model_card
from phi3v_dist.model.official_config import read_config
from phi3v_dist.model.origin import LONGROPE_KEY, ORIGIN_NAME, read_origin
from phi3v_dist.model.phi3v import Phi3VForCausalLM
from phi3v_dist.model.sources import TrainedWeights
from phi3v_dist.model.weights import OfficialFolder, Weights, write_safetensors
from phi3v_dist.progress import Report, show_progress
from phi3v_dist.survive.durable import fsync_folder, write_durably
from phi3v_dist.watch import heartbeat

COPIED = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json",
    "processor_config.json", "tokenizer.model", "added_tokens.json", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip
PROBE_PROMPT = "<|user|>\n<|image_1|>\nWhat is shown in this image?<|end|>\n<|assistant|>\n"

log = logging.getLogger(__name__)


def export(weights: TrainedWeights, settings: Settings, out: Path, merge: bool = False) -> None:
    """Write `out`, unless it holds this checkpoint already.

    Args:
        settings: of the run, with `model.path` where its files are now.
        merge: of a LoRA run, add the adapters to the weights and write the whole model.

    Raises:
        CheckpointError: `out` exists, the checkpoint is not of the base folder's model, or what was written is not
            what was trained. Nothing is left under the name `out` then.
    """
    adapter_only = bool(weights.adapters) and not merge
    _require_a_form(weights, merge)
    origin = weights.describe() | {LONGROPE_KEY: settings.model.longrope, "adapter_only": adapter_only}
    there = read_origin(out)
    if there == origin:
        log.info("%s holds %s already", out, weights.where)
        return
    if out.exists():
        alone = bool(there.get("adapter_only")) and merge
        what = "holds its adapters alone" if alone else f"is not the export of {weights.where}"
        raise CheckpointError(f"{out}: exists and {what}; remove it or choose another --out")
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{partial}: cannot be made: {error.strerror}; choose another --out") from error
    _enter(0, "tokenizer and settings")
    if adapter_only:
        assert isinstance(weights.base, OfficialFolder)  # as _require_a_form has seen
        base = weights.base.folder
        write_adapter(partial, weights.adapters, settings.train.lora, base)
    else:
        base = settings.model.path
        _copy_files(base, partial, settings.data.num_crops)
        with returned_when_freed(), show_progress("tensors") as report:
            _enter(1, "weights")
            write_safetensors(partial, weights, functools.partial(report, "writing"))
            _enter(2, "reading back")
            _verify(partial, weights, settings.model.longrope, report)
    _enter(3, "card")
    write_durably(partial / "README.md", model_card(origin, settings, base))
    write_durably(partial / ORIGIN_NAME, json.dumps(origin, indent=2) + "\n")
    fsync_folder(partial)
    _enter(4, "name")
    partial.rename(out)
    fsync_folder(out.parent)
    what = "adapters for peft" if adapter_only else f"{len(weights.names)} tensors, ready for from_pretrained"
    log.info("%s: %s of %s", out, what, weights.where)


def _enter(part: int, what: str) -> None:
    """Say where the export is; its parts are counted in the place of steps."""
    heartbeat.enter("export", part, what)


def _require_a_form(weights: TrainedWeights, merge: bool) -> None:
    """CheckpointError when a run without adapters is to be merged, or one with more than adapters is not."""
    if merge and not weights.adapters:
        raise CheckpointError(f"{weights.where}: has no adapters to merge; export without --merge")
    if merge or not weights.adapters:
        return
    if weights.in_full:
        raise CheckpointError(
            f"{weights.where}: beside adapters it has {len(weights.in_full)} weights trained in full, such as "
            f"{weights.in_full[0]}, for which peft's format has no place: export with --merge"
        )
    if not isinstance(weights.base, OfficialFolder):
        raise CheckpointError(
            f"{weights.where}: its adapters stand on {weights.base.where}, which is no model folder that peft could "
            "load: export with --merge"
        )


def _copy_files(base: Path, folder: Path, num_crops: int | None) -> None:
    """Everything but weights, as it is, but for the crops that were trained with and the ids that end an answer."""
    for pattern in COPIED:
        for path in base.glob(pattern):
            shutil.copyfile(path, folder / path.name)
            with (folder / path.name).open("rb") as file:
                os.fsync(file.fileno())
    processor = Phi3VProcessor.from_pretrained(base)
    if num_crops is not None:
        preprocessor = json.loads((base / "preprocessor_config.json").read_text())
        write_durably(
            folder / "preprocessor_config.json", json.dumps(preprocessor | {"num_crops": num_crops}, indent=2) + "\n"
        )
    given = base / "generation_config.json"
    try:
        generation: dict[str, Any] = json.loads(given.read_text()) if given.is_file() else {"bos_token_id": 1}
    except ValueError as error:
        raise CheckpointError(f"{given}: not JSON: {error}") from error
    generation |= {"eos_token_id": sorted(processor.stop_ids), "pad_token_id": processor.tokenizer.pad_token_id}
    write_durably(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")


@torch.inference_mode()
def _verify(folder: Path, weights: Weights, longrope: str, report: Report) -> None:
    """Read the folder back: every name, shape, type and bit, and the logits on a picture and a question."""
    written = OfficialFolder(folder)
    problems = [f"{name}: missing" for name in weights.names if name not in written.names]
    for number, name in enumerate(written.names):
        heartbeat.beat(name)
        report("reading back", number, len(written.names))
        tensor, wanted = written.get(name), weights.get(name)
        if not torch.isfinite(tensor).all():
            problems.append(f"{name}: holds numbers that are not finite; the run had diverged, export an earlier step")
        elif tensor.dtype != wanted.dtype or not torch.equal(tensor, wanted):
            problems.append(f"{name}: read back, it is not what was written")
    if problems:
        raise CheckpointError([f"{folder}: {problem}" for problem in problems])
    processor = Phi3VProcessor.from_pretrained(folder, num_crops=1)
    inputs = dict(processor(PROBE_PROMPT, Image.linear_gradient("L").resize((640, 480)).convert("RGB")))
    inputs.pop("num_img_tokens")
    reread, direct = (streamed(read_config(folder), w, longrope)(**inputs).logits for w in (written, weights))
    difference = (direct - reread).abs().max().item()
    if difference != 0.0:
        raise CheckpointError(f"{folder}: read back, its logits differ by {difference}; the folder is kept for a look")
    log.info("read back: every tensor is equal, and so are the logits on a probe picture")


def streamed(config: dict[str, Any], weights: Weights, longrope: Any) -> Phi3VForCausalLM:
    """A model in fp32 whose modules fetch their weights when called and drop them after: one in memory at a time."""
    model = Phi3VForCausalLM.without_weights(config, longrope, attention="sdpa").eval()

    def fetch(prefix: str, module: nn.Module) -> None:
        for name, _ in list(module.named_parameters(recurse=False)):
            weight = weights.get(f"{prefix}.{name}").float()
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def drop(module: nn.Module) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(parameter.to("meta"), requires_grad=False))

    for prefix, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda module, _, prefix=prefix: fetch(prefix, module))
            module.register_forward_hook(lambda module, *_: drop(module))
    return model
