"""What an import is told: a YAML mapping and `key=value` words → `ImportSettings`.

Surprise: templates need no quotes of YAML's. `answer=Product: {{ title }}` on the command line would be a nested
mapping to YAML; the words of text settings are taken as they stand.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from phi3v_dist import resources
from phi3v_dist.config import Section
from phi3v_dist.config_file import key_values, merge, validate
from phi3v_dist.data.importers.download import DownloadSettings
from phi3v_dist.data.templates import template_fields
from phi3v_dist.errors import ConfigError

TEXT_SETTINGS = ("prompt", "answer", "system", "split_key")
NOT_IN_THE_BYTES = ("num_workers", "download", "cache")  # settings that another run of the same import may change


def is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ImportSettings(Section):
    """How records become samples, and samples shards."""

    images: Annotated[list[str], BeforeValidator(_as_list)] = []
    """Columns or templates that give the pictures: a path, a URL, stored bytes, or a list of them. Default: the column
    `images`, `image` or `file_name`, where there is one."""
    prompt: str | None = None
    """Jinja template over the record's columns: the question; its pictures go first."""
    answer: str | None = None
    """As `prompt`, for what the model should say."""
    system: str | None = None
    """As `prompt`, for an optional system turn."""
    messages: str | None = None
    """Column that holds whole conversations, instead of `prompt` and `answer`. Default: `messages` or `conversations`,
    where there is one."""
    allow_no_picture: bool = False
    """Take records whose picture column is empty as text-only samples; else they are bad."""
    image_root: Path | None = None
    """Where relative paths of pictures begin; default: the folder of the source."""
    split_key: str | None = None
    """Column or template; records with the same value go to the same split. Default: the pictures themselves, so that
    none is in two splits."""
    validation_frac: float = Field(0.05, ge=0, lt=1)
    """Share of the keys whose records become the validation split."""
    test_frac: float = Field(0.0, ge=0, lt=1)
    """As `validation_frac`, for a split that nobody looks at until the end."""
    seed: int = Field(0, ge=0)
    """Another seed draws other splits."""
    dedupe: bool = True
    """Keep only the first of samples with equal pictures and words."""
    verify: bool = True
    """Decode every picture before it is accepted; off: only its header is read."""
    shard_size_bytes: int = Field(256 << 20, ge=1 << 10)
    """Largest size to aim at."""
    num_ranks: int = Field(1, ge=1)
    """Ranks that will read the shards, so that there are enough of them; see docs/importing.md."""
    num_workers: int = Field(4, ge=1, le=256)
    """Threads that read and decode pictures."""
    dataset_config: str | None = None
    """Of a data set of the Hugging Face hub: which configuration."""
    dataset_split: str = "train"
    """Of a Hugging Face data set: which of its splits is imported."""
    dataset_revision: str | None = None
    """Of a data set of the hub: branch, tag or commit."""
    download: DownloadSettings = DownloadSettings()
    """Concurrency, time limits, retries and size limit of downloads."""
    cache: Path | None = None
    """Folder of downloaded pictures, which several imports may share; default: in the import's own folder."""

    @field_validator("images", "prompt", "answer", "system", "split_key")
    @classmethod
    def _is_a_template(cls, value: Any) -> Any:
        for text in [value] if isinstance(value, str) else value or []:
            try:
                template_fields(text)
            except ValueError as error:
                raise PydanticCustomError("template", "no Jinja template: {reason}", {"reason": str(error)}) from error
        return value

    def contradictions(self) -> list[str]:
        """Settings that are fine alone and not together."""
        problems = []
        given = [name for name in ("prompt", "answer", "system") if getattr(self, name) is not None]
        if self.messages is not None and given:
            problems.append(
                f"`messages` is given beside `{'`, `'.join(given)}`: name a column of conversations, or templates"
            )
        elif given and (self.prompt is None or self.answer is None):
            missing = "prompt" if self.prompt is None else "answer"
            problems.append(f"`{missing}` is missing; `prompt` and `answer` go together")
        if self.validation_frac + self.test_frac >= 1:
            problems.append("`validation_frac` and `test_frac` leave nothing to train on")
        return problems

    def decides(self) -> dict[str, Any]:
        """What the shards' bytes depend on, as plain data."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key not in NOT_IN_THE_BYTES}

    def templates(self) -> list[str]:
        """Every template given."""
        given = [self.prompt, self.answer, self.system, self.split_key, *self.images]
        return [text for text in given if text is not None and is_template(text)]

    def columns(self) -> list[str]:
        """Columns named as such, outside templates."""
        named = [*self.images, self.messages, self.split_key]
        return [name for name in named if name is not None and not is_template(name)]


def load(mapping: Path | None, words: Sequence[str]) -> ImportSettings:
    """The mapping, or one that ships, with the words over it. Raises ConfigError: one message per mistake."""
    mapping = mapping and resources.find(mapping, "configs")
    tree, problems = merge(mapping, [_quoted(word) for word in key_values(words)], option="--mapping")
    settings, mistakes = validate(ImportSettings, tree)
    problems += mistakes or (settings.contradictions() if settings else [])
    if problems or settings is None:
        raise ConfigError(problems)
    return settings


def _quoted(word: str) -> str:
    key, _, value = word.partition("=")
    is_text = key in TEXT_SETTINGS or key == "images" and is_template(value) and not value.startswith("[")
    return f"{key}={json.dumps(value)}" if is_text and value[:1] not in ('"', "'") else word
