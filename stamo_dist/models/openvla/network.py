"""OpenVLA's network: towers, projector and Llama; and how images, text and action placeholders become one sequence."""

from __future__ import annotations

from typing import NamedTuple

import stamo_dist.models.openvla._timm  # noqa: F401  # isort: skip  must precede timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from stamo_dist.models.openvla.attention import UNPACKED
from stamo_dist.models.openvla.config import OpenVLAConfig
from stamo_dist.models.openvla.vision import FiLMBlock, VisionBackbone
from stamo_dist.models.recompute import recompute_transformers

IGNORE = -100  # label ignored by the loss


class Projector(nn.Module):
    """Patch features (…, D) → language embeddings (…, H): two layers for one tower, three for fused ones."""

    def __init__(self, features: int, hidden: int, fused: bool):
        super().__init__()
        widths = [features, 4 * features, hidden, hidden] if fused else [features, hidden, hidden]
        self.fc1 = nn.Linear(widths[0], widths[1])
        self.fc2 = nn.Linear(widths[1], widths[2])
        self.fc3 = nn.Linear(widths[2], widths[3]) if fused else None

    def forward(self, features: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(features.to(self.fc1.weight.dtype))))
        return x if self.fc3 is None else self.fc3(F.gelu(x))


class Features(NamedTuple):
    """Features of the images by a frozen StaMo encoder, in place of pixels; either may be missing."""

    patches: Tensor | None = None  # (B, V·N, D)
    states: Tensor | None = None  # (B, V·tokens, dim)


class Sequence(NamedTuple):
    """The input of the language model: BOS, image tokens, extra tokens, the rest of the text."""

    embeddings: Tensor  # (B, T, H)
    mask: Tensor | None  # (B, T) bool; None without padding
    inserted: int  # tokens between BOS and the rest of the text


class OpenVLA(nn.Module):
    """Images and text → hidden states and logits. Names are those of the released checkpoints."""

    def __init__(
        self, config: OpenVLAConfig, *, film: bool = False, patch_dim: int | None = None, state_dim: int | None = None
    ):
        """Random weights. Without towers, `patch_dim` and `state_dim` are the dimensions of the outside features."""
        super().__init__()
        self.config = config
        if config.towers:
            self.vision_backbone = VisionBackbone(config.towers, config.hidden if film else None)
            self.projector = Projector(self.vision_backbone.dim, config.hidden, len(config.towers) > 1)
        elif patch_dim is not None:
            self.projector = Projector(patch_dim, config.hidden, fused=False)
        if state_dim is not None:
            self.state_projector = Projector(state_dim, config.hidden, fused=False)
        self.language_model = LlamaForCausalLM._from_config(config.text, attn_implementation=UNPACKED)

    @property
    def film(self) -> bool:
        return bool(self.config.towers) and self.vision_backbone.film

    def image_tokens(self, images: Tensor | Features, language: Tensor | None = None) -> Tensor:
        """Pixels (B, C, S, S) or outside features → (B, P, H)."""
        if isinstance(images, Tensor):
            return self.projector(self.vision_backbone(images, language))
        parts = []
        if images.patches is not None:
            parts.append(self.projector(images.patches))
        if images.states is not None:
            parts.append(self.state_projector(images.states))
        return torch.cat(parts, dim=1)

    def sequence(
        self,
        input_ids: Tensor,
        images: Tensor | Features | None,
        attention_mask: Tensor | None = None,
        extra: Tensor | None = None,
        blank: Tensor | None = None,
    ) -> Sequence:
        """Insert the image tokens, then `extra` (B, K, H), after BOS.

        `blank` (B, L) bool marks text tokens whose embeddings become zero (OFT's action placeholders). FiLM reads the
        mean of all the others, padding included, as the official code does.
        """
        text = self.language_model.get_input_embeddings()(input_ids)
        language = None
        if blank is not None:
            text = text * ~blank[..., None]
        if self.film:
            kept = torch.ones_like(input_ids, dtype=torch.bool) if blank is None else ~blank
            language = text.sum(1) / kept.sum(1, keepdim=True)
        parts = [] if images is None else [self.image_tokens(images, language).to(text.dtype)]
        if extra is not None:
            parts.append(extra.to(text.dtype))
        inserted = sum(part.shape[1] for part in parts)
        embeddings = torch.cat([text[:, :1], *parts, text[:, 1:]], dim=1)
        if attention_mask is None:
            return Sequence(embeddings, None, inserted)
        seen = attention_mask.to(torch.bool)
        front = torch.ones(len(seen), inserted, dtype=torch.bool, device=seen.device)
        return Sequence(embeddings, torch.cat([seen[:, :1], front, seen[:, 1:]], dim=1), inserted)

    def hidden(self, sequence: Sequence, bidirectional: bool = False) -> Tensor:
        """(B, T, H) after the final norm; `bidirectional`: every token attends to all tokens except padding (OFT).

        Padding comes last; outputs at padding are meaningless.
        """
        embeddings, mask, _ = sequence
        batch, length, _ = embeddings.shape
        if not bidirectional:
            mask = None  # causal, with padding at the end: no mask is needed, and attention without one is faster
        else:
            seen = torch.ones(batch, length, dtype=torch.bool, device=embeddings.device) if mask is None else mask
            mask = seen[:, None, None, :].expand(batch, 1, length, length)  # without one, Llama would be causal
        # LlamaModel's own forward: in transformers 5 it looks whether sequences are packed, for which the host waits.
        llama, positions = self.language_model.model, torch.arange(length, device=embeddings.device)[None]
        found, rotation = embeddings, llama.rotary_emb(embeddings, position_ids=positions)
        for layer in llama.layers:
            found = layer(found, attention_mask=mask, position_ids=positions, position_embeddings=rotation)
        hidden: Tensor = llama.norm(found)
        return hidden

    def forward(
        self,
        input_ids: Tensor,
        images: Tensor | Features | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, vocabulary) of the causal model, and the mean cross-entropy where `labels` (B, L) are given."""
        sequence = self.sequence(input_ids, images, attention_mask)
        logits = self.language_model.lm_head(self.hidden(sequence))
        if labels is None:
            return logits, None
        targets = spread(labels, sequence.inserted)[:, 1:]
        return logits, F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        images: Tensor | Features | None,
        tokens: int,
        attention_mask: Tensor | None = None,
        extra: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy decoding of exactly `tokens` ids, cached; no id is excluded, and none ends decoding.

        Prompts of different lengths are padded on the right and masked: every row is decoded independently.

        Returns:
            ids (B, tokens), their logits (B, tokens, vocabulary) and the hidden states (B, tokens, H) they come from.
        """
        embeddings, mask, _ = self.sequence(input_ids, images, attention_mask, extra)
        if mask is not None and bool(mask.all()):
            mask = None
        cache = DynamicCache()
        length = embeddings.shape[1]
        lengths = torch.full((len(embeddings),), length, device=embeddings.device) if mask is None else mask.sum(1)
        out = self.language_model.model(
            inputs_embeds=embeddings, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        rows = torch.arange(len(embeddings), device=embeddings.device)
        state = out.last_hidden_state[rows, lengths - 1]
        ids, logits, states = [], [], []
        for step in range(tokens):
            states.append(state)
            logits.append(self.language_model.lm_head(state))
            ids.append(logits[-1].argmax(-1))
            if step == tokens - 1:
                break
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            out = self.language_model.model(
                input_ids=ids[-1][:, None],
                attention_mask=mask,
                position_ids=(lengths + step)[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            state = out.last_hidden_state[:, 0]
        return torch.stack(ids, 1), torch.stack(logits, 1), torch.stack(states, 1)

    def set_gradient_checkpointing(self, every: int) -> None:
        """Recompute the activations of one block of each `every` in the backward pass; 0: of none."""
        if self.config.towers:
            self.vision_backbone.recompute = every
        recompute_transformers(self.language_model, self.language_model.model.layers, every)

    def block_classes(self) -> tuple[str, ...]:
        """Class names of the transformer blocks that FSDP shards one by one."""
        towers = (FiLMBlock if self.film else Block,) if self.config.towers else ()
        return tuple(c.__name__ for c in (*towers, LlamaDecoderLayer))


def spread(values: Tensor, inserted: int, fill: int = IGNORE) -> Tensor:
    """(B, L) values of the text → (B, inserted + L) of the whole sequence, with `fill` inserted after BOS."""
    return torch.cat([values[:, :1], values.new_full((len(values), inserted), fill), values[:, 1:]], dim=1)
