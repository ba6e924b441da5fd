"""What an exported folder says about itself: README.md in the hub's model-card form.

What comes in: where the weights came from, and the run's settings and folder. What goes out: Markdown with the YAML
head that the hub reads. Surprise: the licence is the base folder's own word or "other"; we never guess one.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from phi3v_dist.config import Settings
from phi3v_dist.model.hub import DIGESTS_NAME, read_digests
from phi3v_dist.observe.metrics import is_own_score


def model_card(origin: dict[str, Any], settings: Settings, base: Path) -> str:
    """Markdown. Scores are those of the run's summary, where it is of this very step.

    base: the model folder whose files were copied, or on which adapters stand.
    """
    summary_path = settings.run.folder / "summary.json"
    summary = json.loads(summary_path.read_text()) if summary_path.is_file() else {}
    if summary.get("train/step") != origin["step"]:
        summary = {}
    scores = {name: value for name, value in summary.items() if is_own_score(name)}
    notices = sorted(path.name for pattern in ("LICENSE*", "NOTICE*") for path in base.glob(pattern))
    licence = _licence(base)
    head = {
        "license": licence or "other", "base_model": _name_of(base),
        "library_name": "peft" if origin["adapter_only"] else "transformers",
        "pipeline_tag": "image-text-to-text", "tags": ["phi3_v", "phi3v-dist"],
    }  # fmt: skip
    train, data = settings.train, settings.data
    parts = ", ".join(f"{part}: {how}" for part, how in train.parts.model_dump().items())
    trained = [part for part, how in train.parts.model_dump().items() if how != "frozen"]
    rates = ", ".join(f"{part} {getattr(train.learning_rate, part):g}" for part in trained)
    lines = [
        f"# {settings.run.name}",
        f"{_name_of(base)}, fine-tuned with phi3v-dist: checkpoint {origin['checkpoint']} of run {origin['run']}.",
        "## Data",
        *[f"- trained on `{shards}`" for source in data.train for shards in source.shards],
        *[f"- evaluated on `{shards}`" for source in data.validation for shards in source.shards],
        "## Training",
        f"- parts: {parts}",
        f"- peak learning rates: {rates}; weight decay {train.weight_decay:g}; gradient clipping {train.grad_clip:g}",
        f"- {train.rows_per_step} rows of up to {data.row_length_tokens:,} tokens in a step; "
        f"{origin['step']:,} steps" + (f", {summary['train/samples']:,.0f} samples" if summary else ""),
        *([f"- began with {settings.model.init_from}"] if settings.model.init_from else []),
        *([f"- LoRA rank {train.lora.rank}, alpha {train.lora.alpha}"] if "lora" in parts else []),
        f"- crops per picture: {data.num_crops or 'as preprocessor_config.json says'}",
        f"- LongRoPE factors by the rule `{settings.model.longrope}`: serve it with an engine that chooses alike",
        "## Scores",
        *([f"- {name}: {value:g}" for name, value in scores.items()] or ["- not evaluated"]),
        "## Licence",
        f"- the base model's own: {licence or 'not stated in its folder; look it up before you pass this on'}",
        *[f"- {name} was copied from it" for name in notices],
        "- the data's licences are for whoever publishes this to state",
    ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n".join(lines).replace("\n#", "\n\n#") + "\n"


def _licence(base: Path) -> str | None:
    """The `license` in the head of the base folder's README.md."""
    from huggingface_hub import metadata_load  # takes 0.2 s

    readme = base / "README.md"
    if not readme.is_file():
        return None
    try:
        return (metadata_load(readme) or {}).get("license")
    except (ValueError, yaml.YAMLError):  # not UTF-8, not YAML, or not a mapping
        return None


def _name_of(base: Path) -> str:
    """The hub's name where `prepare.py weights` noted it, else what config.json says, else the folder's."""
    if (base / DIGESTS_NAME).is_file():
        return read_digests(base).repo
    return str(json.loads((base / "config.json").read_text()).get("_name_or_path") or base.name)
