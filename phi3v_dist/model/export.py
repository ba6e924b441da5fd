"""A checkpoint → a folder that others open.

What comes in: a committed checkpoint and the base folder the run began from. What goes out: official safetensors,
config and tokenizer files. Surprise: tensors that were never computed (CLIP's last layer and norm) come from the base
folder, so the export is complete; and the folder gets its name only after it was read back and gave the same logits.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from phi3v_dist.data.processor import Phi3VProcessor
from phi3v_dist.errors import CheckpointError
from phi3v_dist.model.origin import ORIGIN_NAME
from phi3v_dist.model.phi3v import Phi3VForCausalLM, read_config
from phi3v_dist.model.weights import OfficialFolder, is_untrained, write_safetensors
from phi3v_dist.survive.checkpoint import read_tensors

COPIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "preprocessor_config.json", "processor_config.json", "tokenizer.model", "added_tokens.json", "*.py", "LICENSE*",
)  # fmt: skip
PROBE_PROMPT = "<|user|>\n<|image_1|>\nWhat is shown in this image?<|end|>\n<|assistant|>\n"

log = logging.getLogger(__name__)


def export(checkpoint: Path, base: Path, out: Path) -> None:
    """Write `out`, unless it holds this checkpoint already.

    Raises:
        CheckpointError: `out` exists, the checkpoint is not of the base folder's model, or what was written does not
            give the logits of what was trained. Nothing is left under the name `out` then.
    """
    origin = {"checkpoint": checkpoint.name, "run": checkpoint.parent.parent.name}
    if (out / ORIGIN_NAME).is_file() and json.loads((out / ORIGIN_NAME).read_text()) == origin:
        log.info("%s holds %s already", out, checkpoint.name)
        return
    if out.exists():
        raise CheckpointError(f"{out}: exists and is not the export of {checkpoint}; remove it or choose another --out")
    trained, weights = read_tensors(checkpoint), OfficialFolder(base)
    untrained = [name for name in weights.names if is_untrained(name) and name not in trained.names]
    missing = sorted(set(weights.names) - set(untrained) - set(trained.names))
    extra = sorted(set(trained.names) - set(weights.names))
    if missing or extra:
        raise CheckpointError(
            [f"{checkpoint} does not hold {name} of {base}" for name in missing]
            + [f"{checkpoint} holds {name}, which {base} does not know" for name in extra]
        )
    dtype = weights.dtype

    def get(name: str) -> Tensor:
        return weights.get(name) if name in untrained else trained.get(name).to(dtype)

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for pattern in COPIED:
        for path in base.glob(pattern):
            shutil.copy(path, partial / path.name)
    names = sorted([*trained.names, *untrained])
    write_safetensors(partial, names, get)
    _verify(partial, trained.names, get)
    (partial / ORIGIN_NAME).write_text(json.dumps(origin, indent=2) + "\n")
    partial.rename(out)
    log.info("%s: %d tensors of %s, ready for from_pretrained", out, len(names), checkpoint.name)


@torch.inference_mode()
def _verify(folder: Path, names: list[str], get: Callable[[str], Tensor]) -> None:
    """Read the folder back as a user would and compare logits on a picture and a question."""
    processor = Phi3VProcessor.from_pretrained(folder)
    inputs = dict(processor(PROBE_PROMPT, Image.linear_gradient("L").resize((640, 480)).convert("RGB")))
    inputs.pop("num_img_tokens")
    reread = Phi3VForCausalLM.from_pretrained(folder)(**inputs).logits
    direct = Phi3VForCausalLM.without_weights(read_config(folder)).take({name: get(name) for name in names})
    difference = (direct(**inputs).logits - reread).abs().max().item()
    if difference != 0.0 or not torch.isfinite(reread).all():
        raise CheckpointError(f"{folder}: read back, its logits differ by {difference}; the folder is kept for a look")
    log.info("read back: logits on a probe picture are equal")
