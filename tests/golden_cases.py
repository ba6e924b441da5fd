"""The published code's recorded numbers against ours: one home for running a case, for the tests and `make golden`.

What comes in: tests/golden/ (its README says how it was made). What goes out: per case the largest difference of every
recorded quantity, and what does not match at all. Everything goes through `Phi3VForCausalLM.from_pretrained`.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from conftest import TESTS
from safetensors.torch import load_file
from torch import Tensor

from phi3v_dist.model import Phi3VForCausalLM
from phi3v_dist.model.backends import Backend

GOLDEN = TESTS / "golden"
CONFIGS = ("mha_o64", "gqa_o1024")
NOT_CASES = ("config", "clip_config", "train_curve")
VISION = "model.vision_embed_tokens."

# Absolute, golden/README.md's; token_nll is a difference of two of them. "grad_…" are relative, to the norm of the
# same gradient: 1e-4 is the README's for norms, and held for single values too.
TOLERANCES = {
    "logits": 5e-5, "logsumexp": 5e-5, "token_nll": 5e-5, "loss": 5e-6, "grad_norms": 1e-4, "grad_samples": 1e-4,
    "image_embeds": 1e-5, "clip_feats": 1e-5,
}  # fmt: skip
# Adam divides by small second moments, so that rounding grows from step to step: 1e-3 is the README's for the loss.
# Norms are relative.
CURVE_TOLERANCES = {"loss": 1e-3, "grad_norm": 1e-4}
FINAL_TOLERANCES = {"param_norms": 1e-5, "delta_norms": 1e-4}


@dataclass
class Outcome:
    """Differences by quantity, each with its tolerance, and what is simply not the same."""

    differences: dict[str, float] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)

    def note(self, quantity: str, difference: Tensor | float) -> None:
        """Keep the largest; not a number counts as infinite."""
        value = float(difference.detach() if isinstance(difference, Tensor) else difference)
        value = value if value == value else float("inf")
        self.differences[quantity] = max(self.differences.get(quantity, 0.0), value)

    def failures(self, tolerances: dict[str, float]) -> list[str]:
        """One line for everything that is off."""
        found = {name: value for name, value in self.differences.items() if not value <= tolerances[name]}
        return [f"{name}: {value:.2g} above {tolerances[name]:g}" for name, value in found.items()] + self.mismatches


@dataclass(frozen=True)
class Case:
    """One recorded forward and backward."""

    config: str
    name: str

    @property
    def facts(self) -> dict:
        return json.loads((GOLDEN / "model" / self.config / f"{self.name}.json").read_text())

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(GOLDEN / "model" / self.config / f"{self.name}.safetensors")

    @property
    def rules(self) -> tuple[str, ...]:
        """LongRoPE rules that give the recorded numbers: always the fixed one of the branch that was taken."""
        branch = self.facts["rope_branch"]
        if self.name.endswith("__phi35rule"):
            return ("key_length", branch)
        by_key_length = () if "posreset" in self.name else ("key_length",)
        return ("document", "max_position", *by_key_length, branch)

    @property
    def variants(self) -> list[tuple[str, str]]:
        """(LongRoPE rule, attention backend) under which the case must hold."""
        return [(rule, "auto") for rule in self.rules] + [(self.rules[0], "eager")]

    def inputs(self) -> dict[str, Tensor]:
        """Arguments of the model's call."""
        tensors, pixels = self.tensors, self.facts.get("pixels")
        names = ("input_ids", "attention_mask", "position_ids", "labels")
        inputs = {name: tensors[name] for name in names if name in tensors}
        return inputs | (golden_pixels(pixels) if pixels else {})


def all_cases() -> Iterator[Case]:
    for config in CONFIGS:
        for path in sorted((GOLDEN / "model" / config).glob("*.json")):
            if path.stem not in NOT_CASES:
                yield Case(config, path.stem)


def golden_pixels(pixels: dict) -> dict[str, Tensor]:
    """The README's integer formula, exact in fp32."""
    sizes, seed = pixels["image_sizes"], pixels["pixel_seed"]
    values = torch.zeros(len(sizes), pixels["num_crops_plus_1"], 3, 336, 336)
    y, x = torch.meshgrid(torch.arange(336), torch.arange(336), indexing="ij")
    for n, (height, width) in enumerate(sizes):
        for k in range(height // 336 * (width // 336) + 1):
            for c in range(3):
                v = 3 * x * x + 5 * y * y + 7 * x * y + 11 * x + 17 * y + 101 * c + 211 * k + 307 * n + 53 * seed
                values[n, k, c] = (v % 509 - 254).float() / 128
    return {"pixel_values": values, "image_sizes": torch.tensor(sizes)}


@cache
def _folder(config: str) -> tempfile.TemporaryDirectory:
    """The recorded model as one official folder: the tower's sizes, which stand in a file beside, are merged in."""
    source, folder = GOLDEN / "model" / config, tempfile.TemporaryDirectory()
    fields = json.loads((source / "config.json").read_text())
    fields["img_processor"]["clip_config"] = json.loads((source / "clip_config.json").read_text())
    (Path(folder.name) / "config.json").write_text(json.dumps(fields))
    (Path(folder.name) / "model.safetensors").symlink_to(source / "model.safetensors")
    return folder


def golden_model(config: str, rule: str, attention: str | Backend = "auto") -> Phi3VForCausalLM:
    return Phi3VForCausalLM.from_pretrained(_folder(config).name, rule, attention)


def run_case(case: Case, rule: str, attention: str | Backend = "auto") -> Outcome:
    """Forward and backward of one case, against everything that was recorded of it."""
    outcome, facts, tensors, inputs = Outcome(), case.facts, case.tensors, case.inputs()
    model = golden_model(case.config, rule, attention)
    vision = model.model.vision_embed_tokens
    features = {"image_embeds": [], "clip_feats": []}
    for name, module in (("image_embeds", vision), ("clip_feats", vision.img_processor)):
        module.register_forward_hook(lambda _, __, out, found=features[name]: found.append(out.detach()))
    output = model(**inputs, return_logits=True)
    output.loss.backward()
    _compare_outputs(outcome, output, inputs, tensors, facts)
    if "image_embeds" in tensors:
        embeds, patches = (torch.cat(found) for found in features.values())
        if len(embeds) != facts["image_embeds_total_tokens"]:
            outcome.mismatches.append(f"{len(embeds)} image tokens, not {facts['image_embeds_total_tokens']}")
        outcome.note("image_embeds", (embeds[tensors["image_embeds_pos"]] - tensors["image_embeds"]).abs().max())
        num_real = [height // 336 * (width // 336) + 1 for height, width in tensors["image_sizes"].tolist()]
        real = [crops[:n] for crops, n in zip(tensors["clip_patch_feats"], num_real, strict=True)]
        found = patches[: sum(num_real), tensors["clip_patch_pos"]]
        outcome.note("clip_feats", (found - torch.cat(real)).abs().max())
    _compare_gradients(outcome, model, facts)
    return outcome


def _compare_outputs(outcome: Outcome, output, inputs: dict, tensors: dict, facts: dict) -> None:
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    logits = output.logits.detach()
    if "logits" in tensors:
        outcome.note("logits", (logits - tensors["logits"])[real].abs().max())
    else:
        rows, positions = tensors["logits_pos"].T
        outcome.note("logits", (logits[rows, positions] - tensors["logits_sel"]).abs().max())
    outcome.note("logsumexp", (logits.logsumexp(-1) - tensors["logsumexp"])[real].abs().max())
    outcome.note("loss", abs(output.loss.item() - facts["loss"]))
    losses, nll = output.token_losses.detach(), tensors["token_nll"].flatten()
    if not len(losses) == facts["num_label_tokens"] == int((nll != 0).sum()):
        outcome.mismatches.append(f"{len(losses)} label tokens, not {facts['num_label_tokens']}")
    else:
        outcome.note("token_nll", (losses - nll[nll != 0]).abs().max())


def _compare_gradients(outcome: Outcome, model: Phi3VForCausalLM, facts: dict) -> None:
    floor = 1e-6 * facts["grad_global_norm"]
    for name, parameter in model.named_parameters():
        if (parameter.grad is None) != (name in facts["params_without_grad"]):
            outcome.mismatches.append(f"{name} has {'no' if parameter.grad is None else 'a'} gradient")
        if parameter.grad is None:
            continue
        gradient, recorded = parameter.grad.double().flatten(), facts["grad_norms"][name]
        if name.endswith("k_proj.bias"):  # exactly 0 in theory, rounding in both: compared absolutely
            if not abs(gradient.norm() - recorded) <= floor:
                outcome.mismatches.append(f"{name} has a gradient of norm {gradient.norm():.2g}, not {recorded:.2g}")
            continue
        scale = max(recorded, floor)
        places = torch.linspace(0, len(gradient) - 1, min(6, len(gradient)), dtype=torch.float64).long()
        samples = torch.tensor(facts["grad_samples"][name], dtype=torch.float64)
        outcome.note("grad_norms", abs(gradient.norm() - recorded) / scale)
        outcome.note("grad_samples", (gradient[places] - samples).abs().max() / scale)


@dataclass(frozen=True)
class CurveStep:
    """One optimizer step of a recorded curve: what it saw, and how far off it was."""

    number: int
    case: str
    outcome: Outcome


def run_curve(config: str, rule: str = "max_position") -> tuple[list[CurveStep], Outcome]:
    """Plain AdamW over the recorded steps; then the weights' norms, and the norms of their change, at the end."""
    recorded = json.loads((GOLDEN / "model" / config / "train_curve.json").read_text())
    model = golden_model(config, rule)
    begun = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    steps = []
    for step in recorded["steps"]:
        case, outcome = Case(config, step["case"]), Outcome()
        optimizer.zero_grad()
        loss = model(**case.inputs()).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.5)
        text_only = not case.facts.get("pixels")
        seeing = [name for name, p in model.named_parameters() if name.startswith(VISION) and p.grad is not None]
        if text_only and seeing:
            outcome.mismatches.append(f"without a picture {seeing[0]} and {len(seeing) - 1} others have a gradient")
        optimizer.step()
        outcome.note("loss", abs(loss.item() - step["loss"]))
        outcome.note("grad_norm", abs(norm.item() / step["grad_norm_pre_clip"] - 1))
        steps.append(CurveStep(step["step"], step["case"], outcome))
    final = Outcome()
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):  # its gradient is rounding alone, of which Adam makes whole steps
            continue
        norm, change = parameter.double().norm(), (parameter.detach() - begun[name]).double().norm()
        final.note("param_norms", abs(norm / recorded["final_param_norms"][name] - 1))
        wanted = recorded["final_delta_norms"][name]
        final.note("delta_norms", abs(change - wanted) / max(wanted, 1e-6))
    return steps, final
