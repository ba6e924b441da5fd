"""A YAML file and `key=value` overrides → one frozen `Settings` tree, or every mistake at once.

What comes in: `launch/configs/x.yaml` and the words after it on the command line. What goes out: `Settings`, validated
once, safe to pass anywhere. Surprise: a mistake does not stop the search for the next one. Bad keys are reported, set
aside, and the rest is checked all the same, files and batch arithmetic included, so that one run shows them all.
"""

import contextlib
import itertools
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from omegaconf import OmegaConf
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from phi3v_dist import resources, secrets
from phi3v_dist.config_file import describe, key_values, merge, validate, with_lines
from phi3v_dist.errors import ConfigError

log = logging.getLogger(__name__)
DataclassT = TypeVar("DataclassT")
RAN_WITH = {"versions", "commit", "world_size"}  # of `environment` in RUN/config.yaml; `Run.record` writes it
LongRopeRule = Literal["document", "max_position", "key_length", "short", "long"]  # model/rope.py says what each does
AttentionName = Literal["auto", "flash_attention_2", "flash_attention_3", "sdpa", "eager"]  # model/backends.py


class Section(BaseModel):
    """Base of all settings: frozen, no unknown keys, every number finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: Any) -> Any:
        """`train.steps=yes` is no 1, as Python would have it."""
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and {int, float} & {annotation, *get_args(annotation)}:
            raise PydanticCustomError("number_type", "a number is wanted, not true or false")
        return value


class RunSettings(Section):
    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder name under `root`; starting the same name again continues that run."""
    root: Path = Path("runs")
    """Where run folders live; on a cluster, shared storage."""
    seed: int = Field(0, ge=0)
    """Order of the data and every other random choice."""

    allow_changes: bool = False
    """Go on with a run although settings that change its numbers are others than before."""

    @property
    def folder(self) -> Path:
        """The run folder: config, metrics, checkpoints, evaluations, export, report."""
        return self.root / self.name


class ModelSettings(Section):
    path: Path
    """Folder in the official layout: config.json, *.safetensors, tokenizer and preprocessor files."""
    init_from: str | None = None
    """Weights to begin with, when not those in `path`: another run's folder or one of its checkpoints, a model folder
    such as an export, or `random`. To go on with a run, use its name again instead."""
    longrope: LongRopeRule = "document"
    """What chooses LongRoPE's short or long factors: each document's own length (default), an official batch rule
    (`max_position`: Phi-3, `key_length`: Phi-3.5), or nothing (`short`, `long`); see docs/longrope.md."""
    attention: AttentionName = "auto"
    """`auto` takes flash-attn 3 (Hopper), else 2, else `sdpa`, and says why; one asked for by name is used or refused.
    `eager` is plain maths, for comparison: its memory grows with the square of a document."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute type; `auto` is bf16 on GPUs that have it and fp32 elsewhere. Master weights are always fp32."""
    gradient_checkpointing: bool = True
    """Recompute each layer in the backward pass: about a quarter more work, most of the activation memory saved."""
    mlp_chunk_tokens: int | None = Field(4096, ge=1)
    """With gradient checkpointing: most tokens that a layer's feed-forward part takes at once; null: no limit."""
    offload_activations: bool = False
    """With gradient checkpointing on GPUs: keep what each layer began with in host memory until the backward pass."""
    vision_chunk_crops: int = Field(16, ge=1)
    """With gradient checkpointing: most crops the vision tower takes in one call. Fewer need less memory, and gather
    the tower's weights more often."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


ONE_OR_MORE = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})


class SourceSettings(Section):
    """Tar shards that share a format."""

    shards: Annotated[list[str], BeforeValidator(_as_list), ONE_OR_MORE] = Field(min_length=1)
    """Paths, or addresses with `https://`, `s3://`, `gs://`; `{000..007}` is expanded, and `*` where files can be
    listed. Every named shard must exist."""
    name: str | None = None
    """Shown in metrics and predictions; default: taken from the first shard's name."""
    weight: float | None = Field(None, gt=0)
    """Share in the mix, relative to the other sources; default: number of samples, so that each is seen once an
    epoch."""
    prompt: str | None = None
    """For shards without `messages`: Jinja template over the JSON's fields (`.txt` is `{{ text }}`); pictures go
    first."""
    answer: str | None = None
    """As `prompt`, for what the model should say."""
    system: str | None = None
    """As `prompt`, for an optional system turn; put before `messages` too, unless they begin with one of their own."""


class CacheSettings(Section):
    """Whole copies of remote shards on each node, shared by its ranks."""

    path: Path | None = None
    """Folder on the node's own disk; none: samples are read from the store one by one."""
    limit_gb: float = Field(100, gt=0)
    """What the copies may take; those not used for longest go first."""
    local_shards: bool = False
    """Copy shards given as paths too: for a shared file system that is slower than the node's disk. Those that do not
    fit are read where they are. `launch/prepare.py stage` makes the copies before the run."""


class DataSettings(Section):
    train: list[SourceSettings] = Field(min_length=1)
    """What is learned from."""
    validation: list[SourceSettings] = []
    """What is evaluated on; never trained."""
    cache: CacheSettings = CacheSettings()
    num_crops: int | None = Field(None, ge=1, le=64)
    """Most 336-pixel crops a picture is cut into; default: the model folder's own (16 or 4)."""
    crops: Literal["fast", "exact"] = "fast"
    """How training pictures are cut. `exact`: as the published processor does it; `fast`: several times as fast and a
    quarter of the memory, 0.02 grey steps off on average (global views: up to half a step). Evaluation is always
    exact."""
    packing: bool = True
    """Several samples in one row; off: one sample a row."""
    row_length_tokens: int = Field(4096, ge=16, le=131072)
    """Longest row."""
    fit: Literal["drop", "fewer_crops", "truncate_text"] = "drop"
    """What becomes of a sample longer than a row; counted at the start, named by launch/check.py. `drop`: left out.
    `fewer_crops`: its pictures are cut into as many crops as fit. `truncate_text`: its user and system turns are
    shortened in the middle, never an answer or a picture. What still does not fit is left out."""
    window_samples: int = Field(1024, ge=1)
    """Samples among which rows are packed; larger packs fuller and shuffles a little less freely."""
    num_workers: int = Field(2, ge=1, le=256)
    """Decoding threads per rank."""
    prefetch_rows: int = Field(4, ge=1)
    """Rows decoded ahead per rank."""
    max_bad_frac: float = Field(0.01, ge=0, le=1)
    """Quarantined share of the samples seen at which the run stops."""


class LearningRate(Section):
    """Peak learning rates by part of the model."""

    text: float = Field(1e-5, ge=0)
    vision: float = Field(2e-6, ge=0)
    projector: float = Field(1e-5, ge=0)


Trained = Literal["full", "lora", "frozen"]


class PartsSettings(Section):
    """How each part is trained: every weight, adapters on its linear layers, or not at all."""

    text: Trained = "full"
    """Word embeddings, decoder layers and head. With `lora` embeddings, norms and head stay as they are."""
    vision: Trained = "full"
    """The CLIP tower."""
    projector: Trained = "full"
    """From CLIP's features to the decoder's, separators included."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_dora(cls, value: Any) -> Any:
        if value == "dora":
            raise PydanticCustomError(
                "dora",
                "use lora: DoRA needs a layer's base weight where ZeRO-3 has released it (see model/adapters.py)",
            )
        return value


class LoraSettings(Section):
    """Low-rank adapters, for the parts that `train.parts` sets to `lora`; they usually want 10 x the learning rate."""

    rank: int = Field(16, ge=1, le=4096)
    alpha: int = Field(32, ge=1)
    """An adapter counts alpha / rank times."""
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | None = Field(None, min_length=1)
    """Last words of layer names, such as `qkv_proj`; default: every linear layer of those parts."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainSettings(Section):
    steps: int | None = Field(None, ge=1)
    """Optimizer steps in all; give this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training data; give this or `steps`."""
    rows_per_step: int = Field(8, ge=1)
    """Rows in one optimizer step over the whole job, whatever the number of ranks."""
    gradient_accumulation_steps: int | None = Field(None, ge=1)
    """Rows one rank takes per step; default: rows_per_step / ranks, rounded up. Given, it must agree."""
    parts: PartsSettings = PartsSettings()
    lora: LoraSettings = LoraSettings()
    learning_rate: LearningRate = LearningRate()
    warmup_steps: int | None = Field(None, ge=0)
    """Linear rise from 0; then a cosine. Default: 100, at most a tenth of the run."""
    min_lr_frac: float = Field(0.1, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""
    weight_decay: float = Field(0.1, ge=0)
    """On matrices only: never on norms, biases, separators and embeddings of class and position."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    grad_clip: float = Field(1.0, ge=0)
    """Global norm; 0 turns clipping off."""
    overfit_one_batch: bool = False
    """Train on the first step's rows again and again: the loss must go to about 0 if labels and gradients are right."""


class ParallelSettings(Section):
    deepspeed: Path = Path("ds_configs/zero3.json")
    """DeepSpeed JSON. Numbers that have a home here must be "auto" there."""
    sequence: int = Field(1, ge=1)
    """Ranks that share each row, each with a slice of its tokens (Ulysses). It must divide the attention heads and the
    number of ranks."""
    nvme: Path | None = None
    """Folder on each node's own disk, for a DeepSpeed JSON that keeps optimizer states there."""
    timeout_s: float = Field(1800, gt=0)
    """Longest wait in a collective before the job is declared stuck."""


class CheckpointSettings(Section):
    every_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints; default: from what a save costs and `node_hours_between_failures` (Young, Daly)."""
    node_hours_between_failures: float = Field(1000, gt=0)
    """How long one node runs, on average, before something on it fails; n nodes fail n times as often."""
    keep: int = Field(3, ge=1)
    """Committed checkpoints kept; the newest that verifies is never deleted."""
    best: str | None = None
    """Metric of evaluations, such as `eval/price_mae`, by which the best checkpoint is kept besides, however old it
    gets; `launch/export.py RUN --best` exports it."""
    write_mb_per_s: float | None = Field(400, gt=0)
    """Most that one rank writes in the background, so that steps are not slowed; null: as fast as the disk."""
    local: Path | None = None
    """Folder on each node's own disk for fast copies; only every `shared_every`-th save then goes to the run folder."""
    shared_every: int = Field(4, ge=1)
    """Without `local` every save goes to the run folder; with it also the first, the last, and any at a stop."""
    grace_s: float = Field(60, gt=0)
    """Time between a notice (SIGTERM, SIGUSR1) and the kill; a save that would take longer is not begun. Without a
    notice a Slurm job stops by itself so long, and one step, before its time is up."""


class WatchSettings(Section):
    """What is looked at while a run goes on, and when it is ended."""

    hang_s: float = Field(30, gt=0)
    """A rank without a sign of life hangs after this long, and after `hang_factor` times what the same kind of work has
    usually taken with as many tokens."""
    hang_factor: float = Field(10, ge=1)
    first_s: float = Field(600, gt=0)
    """The same for a kind of work that has not been timed yet: the first step, loading weights, the first prefill."""
    slow_factor: float = Field(10, ge=1)
    """A silent rank that still computes is slow: it is warned of, and ended only after so many times that limit."""
    bad_steps: int = Field(10, ge=1)
    """Steps in a row with a loss or gradient that is not finite, all of them skipped, after which the run stops."""
    compare_every_steps: int = Field(100, ge=1)
    """Steps between comparisons, over all ranks, of what every rank must hold alike."""


class FieldSettings(Section):
    """One thing to read out of an answer."""

    pattern: str | None = None
    """Regular expression; its first group is the value. Applied to the true answer and to the prediction alike."""
    key: str | None = Field(None, min_length=1)
    """Instead: the value's name in the first JSON object of the answer; dots lead inwards (`price.amount`)."""
    kind: Literal["exact", "number", "fuzzy", "relaxed"] = "exact"
    """`exact` compares text (spaces trimmed); `number` gives absolute and percentage errors; `fuzzy` also says how
    alike texts are (ANLS); `relaxed` is right within 5 %, as text where the truth is no number (charts)."""
    decimal: Literal[".", ","] = "."
    """What one separator before exactly three digits means: with `,` 1.234 is more than a thousand."""

    @model_validator(mode="after")
    def _is_found_in_one_way(self) -> "FieldSettings":
        if (self.pattern is None) == (self.key is None):
            raise PydanticCustomError("way", "a field is read by a `pattern` or by a `key` of JSON: give one of them")
        return self

    @field_validator("pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            num_groups = re.compile(pattern).groups
        except re.error as error:
            raise PydanticCustomError("regex", "not a regular expression: {reason}", {"reason": str(error)}) from error
        if not num_groups:
            raise PydanticCustomError("regex", "it needs a group, (…), around the value")
        return pattern


FieldName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]  # it becomes a part of metric names


def _bins(value: Any, handler: Callable[[Any], Any]) -> Any:
    """One message, where a choice of types would give one for each."""
    with contextlib.suppress(ValidationError):
        rule = handler(value)
        if rule == "values" or len(rule) > 1 and all(low < high for low, high in itertools.pairwise(rule)):
            return rule
    raise PydanticCustomError("bins", "edges of bins are wanted, each above the one before ([0, 0.5, 1]), or values")


Bins = Annotated[list[float] | Literal["values"], WrapValidator(_bins)]


class EvalSettings(Section):
    every_steps: int | None = Field(None, ge=1)
    """Steps between evaluations; default: only at the end."""
    samples: int = Field(64, ge=1)
    """Validation samples in an evaluation during training (the first ones in a fixed order)."""
    final_samples: int | None = Field(None, ge=1)
    """Validation samples in the last one; default: all."""
    batch_samples: int = Field(8, ge=1)
    """Answers generated together on one rank."""
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    """0 takes the likeliest token each time. Above it tokens are drawn, by `run.seed`, sample and place in the answer
    alone."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw among the likeliest tokens that together have this probability."""
    blind: bool = True
    """Also ask every question with pictures exchanged among samples of the same shape: what can be said without
    seeing."""
    base: bool = True
    """Before the first step, ask the model as it is then the questions of the last evaluation: what tuning changes."""
    batch_tokens: int = Field(32768, ge=1)
    """Most places for tokens in such a batch, samples x the longest; a longer sample is answered alone."""
    fields: dict[FieldName, FieldSettings] = {}
    by: dict[FieldName, Bins] = {}
    """Scores once more for parts of the samples: field of their JSON → edges of bins (`depth: [0, 0.5, 1]`; the last
    bin holds its upper edge), or `values`: a part for each value. Every sample also has `source`, `num_tokens` and
    `num_images`; `position` splits the loss alone, by where in its sample each learned token stands."""
    reference: Path | None = None
    """JSON with figures to show beside the scores, such as `best_price_mae` or `chance_title`; sample data have one."""

    @field_validator("by")
    @classmethod
    def _positions_have_bins(cls, by: dict[str, Any]) -> dict[str, Any]:
        if by.get("position") == "values":
            raise PydanticCustomError("position", "`position` takes edges of bins, such as [0, 4096, 131072]")
        return by


class ObserveSettings(Section):
    log_every_steps: int = Field(10, ge=1)
    """Steps between console lines, and in a window whose numbers are gathered from all ranks; metrics.jsonl has every
    step."""
    peak_tflops: float | None = Field(None, gt=0)
    """Dense bf16 peak of one process's device in TFLOP/s, for MFU; default: that of the GPU, where it is known. Without
    one no MFU is logged."""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "phi3v-dist"
    wandb_entity: str | None = None
    tensorboard: bool = False
    """Also write `RUN/tensorboard`; needs the extra `tensorboard` of setup.cfg."""


class Settings(Section):
    """Everything a run is told. One section per stage; one number, one home."""

    run: RunSettings = RunSettings()
    model: ModelSettings
    data: DataSettings
    train: TrainSettings = TrainSettings()
    parallel: ParallelSettings = ParallelSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    watch: WatchSettings = WatchSettings()
    eval: EvalSettings = EvalSettings()
    observe: ObserveSettings = ObserveSettings()


def load(
    path: Path | str, overrides: Sequence[str] = (), check: Callable[[Settings], list[str]] | None = None
) -> Settings:
    """Merge a YAML file with `key=value` overrides and validate.

    Args:
        path: the file, or a recipe that ships with the package.
        check: further looks at the settings (files, arithmetic), returning one message per problem; it is also given
            settings whose bad keys were replaced by their defaults, so that all mistakes are shown together.

    Raises:
        ConfigError: with one message per mistake: the key, the value, and what to change.
    """
    given, path = Path(path), resources.find(Path(path), "configs")
    if path != given:
        log.info("%s is not here: using the recipe that ships with phi3v-dist, %s", given, path)
    tree, problems = merge(path, overrides)
    recorded = tree.get("environment")  # of a run's own config.yaml: what it ran with, and no setting
    if isinstance(recorded, dict) and set(recorded) == RAN_WITH:
        del tree["environment"]
    settings, mistakes = validate(Settings, tree)
    problems += with_lines(mistakes, path, overrides)
    if settings is not None:
        wrong = {mistake.split("`")[1] for mistake in mistakes}  # for these keys a default stands in; nobody chose it
        further = _contradictions(settings) + (check(settings) if check else [])
        problems += [problem for problem in further if not any(f"`{key}`" in problem for key in wrong)]
    if problems or settings is None:
        raise ConfigError(problems)
    return settings


def of_run(run: Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings that a run recorded, wherever it lies now, and on top what was moved since.

    Raises:
        ConfigError: the folder is no run's, or a word is no setting.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run}: no config.yaml, so this is no run folder")
    try:
        tree, problems = merge(path, overrides)
    except ConfigError as error:
        tree, problems = {}, error.problems
    tree.pop("environment", None)
    tree["run"] = {**(tree.get("run") or {}), "root": str(run.resolve().parent), "name": run.resolve().name}
    settings, mistakes = validate(Settings, tree)
    if problems or mistakes or settings is None:
        raise ConfigError(
            [f"{path}: not the settings of a run that this release understands: {one}" for one in problems + mistakes]
        )
    return settings


def parse(kind: type[DataclassT], words: Sequence[str]) -> DataclassT:
    """A settings dataclass of its own, such as the sample catalogue's, from `key=value` words alone.

    Raises:
        ConfigError: as `load`.
    """
    tree: Any = OmegaConf.to_container(OmegaConf.from_dotlist(key_values(words)))
    known = sorted(field.name for field in fields(kind))  # type: ignore[arg-type]
    mistakes: list[Any] = [{"type": "extra_forbidden", "loc": (key,)} for key in tree if key not in known]
    try:
        settings = TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        mistakes += error.errors()
    if mistakes:
        raise ConfigError([describe(mistake, known) for mistake in mistakes])
    return settings


def json_schema() -> dict[str, Any]:
    """JSON schema of the YAML files, for editors; descriptions name commands as they are typed in the repository."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Settings.model_json_schema()


def dump(settings: Settings) -> dict[str, Any]:
    """The resolved tree as plain data, for config.yaml and W&B; what is secret in it is redacted."""
    tree: dict[str, Any] = secrets.redacted_tree(settings.model_dump(mode="json"))
    return tree


def _contradictions(settings: Settings) -> list[str]:
    """What pydantic cannot see: settings that are fine alone and not together."""
    problems = secrets.problems(settings.model_dump(mode="json"))
    train = settings.train
    if set(train.parts.model_dump().values()) == {"frozen"}:
        problems.append("`train.parts` freezes everything, so there is nothing to train")
    if (train.steps is None) == (train.epochs is None):
        found = f"steps={train.steps}, epochs={train.epochs}"
        problems.append(f"`train.steps` or `train.epochs` must be given, one of the two (found {found})")
    if train.steps is not None and (train.warmup_steps or 0) >= train.steps:
        problems.append(
            f"`train.warmup_steps` is {train.warmup_steps} but the run has only {train.steps} steps: lower it"
        )
    if train.gradient_accumulation_steps is not None and train.rows_per_step % train.gradient_accumulation_steps:
        problems.append(
            f"`train.rows_per_step` {train.rows_per_step} is not a multiple of "
            f"`train.gradient_accumulation_steps` {train.gradient_accumulation_steps}: leave the latter out"
        )
    if settings.data.cache.local_shards and not settings.data.cache.path:
        problems.append("`data.cache.local_shards` is set, but not where: set data.cache.path to a folder on the nodes")
    if settings.eval.top_p < 1 and not settings.eval.temperature:
        problems.append(
            f"`eval.top_p` is {settings.eval.top_p:g}, but with `eval.temperature` 0 nothing is drawn: raise that, or "
            "leave this out"
        )
    if settings.eval.every_steps and not settings.data.validation:
        problems.append("`eval.every_steps` is set but `data.validation` names no shards")
    return problems
