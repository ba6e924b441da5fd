"""Phi-3-Vision: tokens and pictures → losses or logits.

What comes in: a folder in the official layout, then batches. What goes out: per-token losses (training) or logits. The
parts are transformers' own Phi-3 and CLIP layers under the official parameter names; the loop over them is ours.
Surprise: neither `Phi3Model` nor its mask builder is called. Its initialisation fails under `zero.Init` when a
padding id is set (transformers 5.23), its masks are dense, and it lets packed documents see each other unless asked
just right.

Every call takes one path: rows lose their padding, become one flat row of documents, and get it back at the end.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3RMSNorm
from transformers.utils import ModelOutput

from phi3v_dist.model.attention import INTERFACE, Layout
from phi3v_dist.model.backends import Backend, check_name, choose
from phi3v_dist.model.cache import KeyValueCache
from phi3v_dist.model.loss import Head
from phi3v_dist.model.mlp import FeedForward
from phi3v_dist.model.official_config import DEFAULT_PAD_ID, head_dim, read_config
from phi3v_dist.model.offload import HostActivations, kept_on_host
from phi3v_dist.model.origin import recorded_longrope
from phi3v_dist.model.placement import Placement, num_crops_of
from phi3v_dist.model.rope import LongRope
from phi3v_dist.model.vision import ImageEmbedding, Normalization
from phi3v_dist.model.weights import EMBEDDING, OfficialFolder, Weights, check_names
from phi3v_dist.parallel.ulysses import ALONE, SequenceGroup


@dataclass
class Phi3VOutput(ModelOutput):
    """loss: mean over label tokens. token_losses: fp32, one per label token, in order. logits: [rows, tokens,
    vocab]."""

    loss: Tensor | None = None
    token_losses: Tensor | None = None
    logits: Tensor | None = None


class Phi3VDecoder(nn.Module):
    """`model`: embeddings of words and pictures, decoder layers, final norm."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "hidden_act", "rms_norm_eps", "attention_dropout", "resid_pdrop", "vocab_size")  # fmt: skip
        fields = {name: config[name] for name in names if name in config}
        fixed: dict[str, Any] = {
            "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "sliding_window": None,
            "attn_implementation": INTERFACE,
        }  # fmt: skip
        phi3 = Phi3Config(**fields, **fixed)
        pad_id = config.get("pad_token_id", DEFAULT_PAD_ID)
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"], padding_idx=pad_id)
        self.vision_embed_tokens = ImageEmbedding(config)
        self.embed_dropout = nn.Dropout(config.get("embd_pdrop", 0.0))
        self.layers = nn.ModuleList([_layer(phi3, i) for i in range(phi3.num_hidden_layers)])
        self.norm = Phi3RMSNorm(phi3.hidden_size, eps=phi3.rms_norm_eps)
        self.gradient_checkpointing = False
        self.host_activations: HostActivations | None = None  # where checkpointed layers keep what they began with

    def embed(
        self,
        input_ids: Int[Tensor, "rows tokens"],
        pixel_values: Tensor | None,
        placement: Placement | None,
        normalization: Normalization | None = None,
        num_vision_chunks: int | None = None,
        sequence: SequenceGroup = ALONE,
    ) -> Float[Tensor, "rows tokens hidden"]:
        """Words by table, negative ids by the pictures' features; ValueError when those are not given."""
        embeds = self.embed_tokens(input_ids.clamp(min=0))
        if pixel_values is not None and placement is not None:
            features = self.vision_embed_tokens(pixel_values, placement, normalization, num_vision_chunks, sequence)
            embeds = embeds.index_copy(1, placement.positions, features[None].to(embeds.dtype))
        elif (input_ids < 0).any():
            raise ValueError("the text has places for pictures, but pixel_values or image_sizes is missing")
        return self.embed_dropout(embeds)

    def forward(
        self,
        embeds: Float[Tensor, "rows tokens hidden"],
        rotation: tuple[Tensor, Tensor],
        backend: Backend | None = None,
        layout: Layout | None = None,
        cache: KeyValueCache | None = None,
        sequence: SequenceGroup = ALONE,
    ) -> Float[Tensor, "rows tokens hidden"]:
        """Through all layers and the final norm, with a backend and a layout, or a cache, which attends by itself.

        `rotation` is cos and sin of every token.
        """
        hidden = embeds
        arguments: dict[str, Any] = {"position_embeddings": rotation, "layout": layout}
        arguments |= {"backend": backend, "cache": cache, "sequence": sequence}
        recompute = self.gradient_checkpointing and self.training
        with kept_on_host(self.host_activations if recompute else None):
            for layer in self.layers:
                if recompute:
                    hidden = checkpoint(layer, hidden, use_reentrant=False, **arguments)
                else:
                    hidden = layer(hidden, **arguments)
        return self.norm(hidden)


class Phi3VForCausalLM(nn.Module):
    """The whole model, parameters named as in the official safetensors.

    Args:
        config: the official config.json. `img_processor.clip_config` may hold CLIPVisionConfig fields of another tower.
        longrope: what chooses LongRoPE's factors; see `rope.py`.
        attention: a name of `model.attention`, decided at the first forward by device and type; or what was decided.

    Raises:
        ConfigError: there is no such rule or backend.
    """

    def __init__(self, config: dict[str, Any], longrope: str = "document", attention: str | Backend = "auto"):
        super().__init__()
        if not isinstance(attention, Backend):
            check_name(attention)
        self.config, self.longrope, self.attention = config, longrope, attention
        self._decided: dict[tuple[torch.device, torch.dtype], Backend] = {}
        self.rope = LongRope(config, longrope)
        self.model = Phi3VDecoder(config)
        self.lm_head = Head(config["hidden_size"], config["vocab_size"], bias=False)

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        longrope: str | None = None,
        attention: str | Backend = "auto",
        dtype: torch.dtype | None = None,
    ) -> "Phi3VForCausalLM":
        """Read config.json and safetensors.

        Args:
            longrope: None is the rule that the folder was exported with, `document` where none is recorded.
            dtype: None is the type in which the files hold the word embeddings.

        Raises:
            CheckpointError: a file is missing, or names and shapes do not fit; all of them are listed.
            ConfigError: there is no such rule or backend.
        """
        longrope = recorded_longrope(Path(folder)) if longrope is None else longrope
        weights = OfficialFolder(Path(folder))
        return cls.of(read_config(Path(folder)), weights, longrope, attention, dtype)

    @classmethod
    def of(
        cls, config: dict[str, Any], weights: Weights, longrope: str, attention: str | Backend,
        dtype: torch.dtype | None,
    ) -> "Phi3VForCausalLM":  # fmt: skip
        """As `from_pretrained`, with weights from anywhere."""
        model = cls.without_weights(config, longrope, attention)
        check_names({name: tuple(p.shape) for name, p in model.named_parameters()}, weights)
        dtype = dtype or weights.dtype(EMBEDDING)
        return model.take({name: weights.get(name).to(dtype) for name, _ in model.named_parameters()})

    @classmethod
    def without_weights(
        cls, config: dict[str, Any], longrope: str = "document", attention: str | Backend = "auto"
    ) -> "Phi3VForCausalLM":
        """The modules alone, their parameters on the meta device until `take`."""
        with torch.device("meta"):
            model = cls(config, longrope, attention)
        embeddings: Any = model.model.vision_embed_tokens.img_processor.vision_model.embeddings
        embeddings.position_ids = torch.arange(embeddings.num_positions)[None]  # a buffer, in no file
        return model

    def take(self, tensors: dict[str, Tensor]) -> "Phi3VForCausalLM":
        """Make these tensors, all on one device, the parameters; nothing is copied."""
        self.load_state_dict(tensors, assign=True)
        return self.to(next(iter(tensors.values())).device).eval()

    def backend(self, device: torch.device, dtype: torch.dtype) -> Backend:
        """What attends there: decided once for a device and a type.

        Raises:
            ConfigError: the backend asked for cannot run there.
        """
        if isinstance(self.attention, Backend):
            return self.attention
        if (device, dtype) not in self._decided:
            self._decided[device, dtype] = choose(self.attention, device, dtype, head_dim(self.config))
        return self._decided[device, dtype]

    def set_gradient_checkpointing(
        self, on: bool, vision_chunk_crops: int | None = None, mlp_chunk_tokens: int | None = None,
        host_activations: HostActivations | None = None,
    ) -> None:  # fmt: skip
        """Recompute decoder and vision layers in the backward pass, the latter in chunks of so many crops, feed-forward
        parts in chunks of so many tokens; None: no limit. What decoder layers began with waits in
        `host_activations`; None: on the device."""
        self.model.gradient_checkpointing, self.model.host_activations = on, host_activations
        for module in self.modules():
            if isinstance(module, FeedForward):
                module.chunk_tokens = mlp_chunk_tokens if on else None
        self.model.vision_embed_tokens.set_gradient_checkpointing(on, vision_chunk_crops)

    def forward(
        self,
        input_ids: Int[Tensor, "rows tokens"],
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_logits: bool = False,
        layout: Layout | None = None,
        placement: Placement | None = None,
        normalization: Normalization | None = None,
        num_vision_chunks: int | None = None,
        sequence: SequenceGroup = ALONE,
    ) -> Phi3VOutput:
        """Losses for labels, logits when asked for or without labels.

        Args:
            input_ids: image positions are negative; pictures are placed in list order.
            pixel_values: [images, num_crops + 1, 3, 336, 336] as the processor makes it, or flat real crops
                [crops, 3, 336, 336], to which unplaced crops may be added at the end.
            image_sizes: (height, width) of the padded pictures, on the CPU where speed matters.
            attention_mask: 1 for real tokens, 0 for padding on either side.
            position_ids: a new document begins where they return to 0; documents do not see each other.
            labels: not shifted; -100 is ignored.
            layout: instead of attention_mask and labels, for one flat row whose borders and labels are known.
            placement: instead of image_sizes, where the layout is; flat crops go with it.
            normalization: for pixel_values that are uint8 pixels; floats are normalised already.
            num_vision_chunks: calls of the vision tower while it is checkpointed, equal on every rank.
            sequence: the ranks that share the row. Ids, positions, labels' targets and crops are then this rank's own,
                the layout's documents those of the whole row, and so are the losses this rank's.

        Raises:
            ValueError: pictures, places for them, masks and layouts do not fit together.
        """
        num_rows, length = input_ids.shape
        keep = None if attention_mask is None else attention_mask.bool()
        if layout is None:
            if not input_ids.numel():
                raise ValueError(f"input_ids {tuple(input_ids.shape)} holds no token")
            if keep is not None and (keep.shape != input_ids.shape or not keep.any()):
                raise ValueError(f"attention_mask {tuple(keep.shape)} must be as input_ids, and not all 0")
            if position_ids is None:
                position_ids = torch.arange(length, device=input_ids.device).expand(num_rows, length)
            layout, longest = self._lay_out(position_ids, keep, labels), int(position_ids.max()) + 1
            input_ids, position_ids = (_flatten(t, keep) for t in (input_ids, position_ids))
            if pixel_values is not None:
                placement = Placement.in_row(input_ids, image_sizes)
        else:
            if keep is not None or labels is not None or position_ids is None or num_rows != 1:
                raise ValueError("a layout goes with position_ids and one flat row, without attention_mask and labels")
            if sum(layout.lengths) != length * sequence.size:
                row = f"{length} x {sequence.size}" if sequence.size > 1 else length
                raise ValueError(f"documents of {sum(layout.lengths)} tokens do not fill a row of {row}")
            longest = max(layout.lengths)
        if pixel_values is not None and pixel_values.dim() == 5:
            pixel_values = _real_crops(pixel_values, image_sizes)
        embeds = self.model.embed(input_ids, pixel_values, placement, normalization, num_vision_chunks, sequence)
        deciding = self.rope.deciding(layout.rope_lengths, longest, length * sequence.size)
        rotation = self.rope(position_ids, deciding[None], embeds.dtype)
        backend = self.backend(embeds.device, embeds.dtype)
        hidden = self.model(embeds, rotation, backend, layout=layout, sequence=sequence)
        output = Phi3VOutput()
        if layout.num_targets or labels is not None or not return_logits and self.training:
            losses = self.lm_head(hidden[0, layout.target_positions], layout.targets)
            output.token_losses = losses
            output.loss = losses.sum() / max(layout.num_targets, 1)
        if return_logits or output.loss is None:
            flat = self.lm_head(hidden)[0]
            logits = flat.new_zeros(num_rows, length, flat.shape[-1])
            mask = torch.ones_like(logits[..., 0], dtype=torch.bool) if keep is None else keep
            output.logits = logits.masked_scatter(mask[..., None], flat)
        return output

    def _lay_out(self, position_ids: Tensor, keep: Tensor | None, labels: Tensor | None) -> Layout:
        """Documents of padded rows: they begin with each row and wherever positions return to 0."""
        starts = position_ids == 0
        first = torch.zeros_like(starts) if keep is None else keep.int().argmax(1)[:, None] == _columns(starts)
        starts = starts | (first if keep is not None else _columns(starts) == 0)
        flat = _flatten(starts, keep)[0]
        begins = flat.nonzero().flatten().tolist()
        lengths = [end - begin for begin, end in zip(begins, [*begins[1:], len(flat)], strict=True)]
        return Layout.of(lengths, None if labels is None else _flatten(labels, keep)[0].cpu()).to(position_ids.device)


def _layer(config: Phi3Config, number: int) -> Phi3DecoderLayer:
    layer = Phi3DecoderLayer(config, number)
    layer.mlp = FeedForward(config)
    return layer


def _columns(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)


def _flatten(values: Tensor, keep: Tensor | None) -> Tensor:
    """[rows, tokens] → [1, real tokens]."""
    return values.reshape(1, -1) if keep is None else values[keep][None]


def _real_crops(pixel_values: Tensor, image_sizes: Tensor | None) -> Tensor:
    """The processor's zero-padded crops without the padding; ValueError when pictures and sizes are not as many."""
    if image_sizes is None or len(image_sizes) != len(pixel_values):
        raise ValueError(f"{len(pixel_values)} pictures need as many image_sizes, found {image_sizes}")
    sizes = image_sizes.tolist()
    return torch.cat([crops[: num_crops_of(h, w)] for crops, (h, w) in zip(pixel_values, sizes, strict=True)])
