"""The trained network of a policy: OpenVLA, OFT's parts and the world head, with the losses of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stamo_dist.errors import RecipeError
from stamo_dist.models.openvla.config import OpenVLAConfig
from stamo_dist.models.openvla.heads import ActionHead, ProprioProjector, WorldHead
from stamo_dist.models.openvla.network import IGNORE, Features, OpenVLA, Sequence
from stamo_dist.recipe.policy import PolicyConfig


@dataclass(frozen=True)
class PolicySizes:
    """Dimensions given by the data and the StaMo tokenizer."""

    action_dim: int  # A
    chunk: int = 1  # C, the actions it predicts at once
    proprio_dim: int = 0  # P
    target: tuple[int, int] | None = None  # (tokens, dim) of the world head's target
    patch_dim: int | None = None  # dim of the StaMo encoder's patch features, if the policy reads them
    state_dim: int | None = None  # dim of its state tokens, if the policy reads them

    @property
    def action_tokens(self) -> int:
        return self.action_dim * self.chunk


class Inputs(NamedTuple):
    """One batch. Masked entries may hold any value, even NaN.

    In training, a policy with a world head always gets a target, and one with an action head always gets actions:
    parameters without a gradient would block a data-parallel engine.
    """

    input_ids: Tensor  # (B, L) prompt, action ids or placeholders, </s>; padded on the right
    attention_mask: Tensor | None  # (B, L) bool; None without padding
    prompts: Tensor  # (B,) ids of each prompt, the space behind it included
    images: Tensor | Features  # pixels (B, C, S, S) or a StaMo encoder's features
    labels: Tensor | None = None  # (B, L); -100 except at action ids and </s>
    proprio: Tensor | None = None  # (B, P) normalised
    actions: Tensor | None = None  # (B, C, A) normalised
    has_actions: Tensor | None = None  # (B,) bool; all of them when omitted
    target: Tensor | None = None  # (B, tokens, dim) target of the world head
    has_target: Tensor | None = None  # (B,) bool; all of them when omitted


class Losses(NamedTuple):
    """Losses per sample; averaging, masking and weighting are the caller's. Zero if a sample has none."""

    action: Tensor  # (B,) sum over the sample's `action_count` terms
    action_count: Tensor  # (B,) number of tokens; or 1 if the loss is the chunk's mean
    mse: Tensor  # (B,) mean squared error of the world head
    l1: Tensor  # (B,) its mean absolute error
    target_count: Tensor  # (B,) 1 if there is a target


class PolicyPrediction(NamedTuple):
    """Outputs of an inference pass: ids or values of the actions, and the world head's prediction."""

    ids: Tensor | None  # (B, C·A)
    actions: Tensor | None  # (B, C, A) normalised
    world: Tensor | None  # (B, tokens, dim)


class PolicyNetwork(nn.Module):
    """OpenVLA (`vla`) with the parts beside it. An engine wraps the whole; `forward` is its only entry in training."""

    def __init__(self, config: OpenVLAConfig, cfg: PolicyConfig, sizes: PolicySizes):
        """Random weights.

        Raises:
            RecipeError: the parts in `cfg` do not fit `sizes`.
        """
        super().__init__()
        _check(config, cfg, sizes)
        self.cfg, self.sizes = cfg, sizes
        self.vla = OpenVLA(config, film=cfg.film, patch_dim=sizes.patch_dim, state_dim=sizes.state_dim)
        self.action_head = ActionHead(config.hidden, sizes.action_dim) if cfg.actions == "regression" else None
        if self.action_head is not None:
            self.vla.language_model.lm_head.requires_grad_(False)  # it gets no gradient
        self.proprio_projector = ProprioProjector(sizes.proprio_dim, config.hidden) if cfg.proprio else None
        world = cfg.world
        self.world_head = WorldHead(config.hidden, *sizes.target, world.width) if world and sizes.target else None

    @property
    def parallel(self) -> bool:
        """Whether all actions come from one pass with bidirectional attention (OFT)."""
        return self.cfg.actions != "tokens"

    def forward(self, inputs: Inputs) -> Losses:
        """The losses of a batch, each float32."""
        sequence = self._sequence(inputs)
        hidden = self.vla.hidden(sequence, self.parallel)
        places = self._places(inputs, sequence)
        size = len(inputs.input_ids)
        if self.action_head is not None and inputs.actions is not None:
            has = _mask(inputs.has_actions, size, hidden.device)
            error = _difference(self.action_head(_pick(hidden, places)), inputs.actions, has)
            action, count = error.abs().mean((1, 2)), has.float()
        elif self.action_head is None and inputs.labels is not None:
            action, count = self._token_loss(hidden, inputs, sequence)
        else:
            action = count = hidden.new_zeros(size, dtype=torch.float32)
        mse = l1 = targets = hidden.new_zeros(size, dtype=torch.float32)
        if self.world_head is not None and inputs.target is not None:
            has = _mask(inputs.has_target, size, hidden.device)
            error = _difference(self.world_head(self._world_state(hidden, places, inputs)), inputs.target, has)
            mse, l1 = error.square().mean((1, 2)), error.abs().mean((1, 2))
            targets = has.float()
        return Losses(action, count, mse, l1, targets)

    @torch.no_grad()
    def predict(self, inputs: Inputs, tokens: int | None = None) -> PolicyPrediction:
        """Greedy actions of prompts; with a parallel policy `input_ids` holds its placeholders and </s> as well.

        `tokens`: number of ids to decode sequentially, C·A when omitted.
        """
        if not self.parallel:
            ids, _, states = self.vla.generate(
                inputs.input_ids,
                inputs.images,
                tokens or self.sizes.action_tokens,
                inputs.attention_mask,
                self._extra(inputs),
            )
            state = states[:, 0] if self.cfg.world is None or self.cfg.world.read == "prompt" else states.mean(1)
            return PolicyPrediction(ids, None, None if self.world_head is None else self.world_head(state).float())
        sequence = self._sequence(inputs)
        hidden = self.vla.hidden(sequence, bidirectional=True)
        places = self._places(inputs, sequence)
        states = _pick(hidden, places)
        world = None
        if self.world_head is not None:
            world = self.world_head(self._world_state(hidden, places, inputs)).float()
        if self.action_head is not None:
            return PolicyPrediction(None, self.action_head(states).float(), world)
        return PolicyPrediction(self.vla.language_model.lm_head(states).argmax(-1), None, world)

    def _extra(self, inputs: Inputs) -> Tensor | None:
        if self.proprio_projector is None:
            return None
        if inputs.proprio is None:
            raise ValueError("the policy reads proprioception (policy.proprio) and the batch has none")
        return self.proprio_projector(inputs.proprio)

    def _sequence(self, inputs: Inputs) -> Sequence:
        blank = None
        if self.parallel:
            place = torch.arange(inputs.input_ids.shape[1], device=inputs.input_ids.device)
            first = inputs.prompts[:, None]
            blank = (place >= first) & (place < first + self.sizes.action_tokens)
        return self.vla.sequence(inputs.input_ids, inputs.images, inputs.attention_mask, self._extra(inputs), blank)

    def _places(self, inputs: Inputs, sequence: Sequence) -> Tensor:
        """(B, C·A) positions of the hidden states that predict the actions (each predicts the next token)."""
        ahead = torch.arange(self.sizes.action_tokens, device=inputs.prompts.device)
        places = (sequence.inserted + inputs.prompts - 1)[:, None] + ahead
        return places.clamp_max(sequence.embeddings.shape[1] - 1)

    def _token_loss(self, hidden: Tensor, inputs: Inputs, sequence: Sequence) -> tuple[Tensor, Tensor]:
        """Sums over each sample's labelled tokens (action ids and </s>), and their number."""
        assert inputs.labels is not None
        # Logits only at these positions: the vocabulary is eight times as wide as the hidden states. The true number
        # of labels is not read, as that would wait for the device.
        ahead = torch.arange(self.sizes.action_tokens + 1, device=hidden.device)
        text = inputs.prompts[:, None] + ahead
        last = inputs.labels.shape[1] - 1
        targets = torch.where(text > last, IGNORE, inputs.labels.gather(1, text.clamp_max(last)))
        places = (sequence.inserted + text - 1).clamp_max(hidden.shape[1] - 1)
        logits = self.vla.language_model.lm_head(_pick(hidden, places)).float()
        terms = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
        return terms.view_as(targets).sum(1), (targets != IGNORE).sum(1).float()

    def _world_state(self, hidden: Tensor, places: Tensor, inputs: Inputs) -> Tensor:
        """(B, H): the last prompt token's hidden state, or the mean over the actions' states if the sample has any."""
        if self.cfg.world is None or self.cfg.world.read == "prompt":
            return _pick(hidden, places[:, :1])[:, 0]
        states = _pick(hidden, places)
        # A sample without actions has no action positions in a causal sequence: the end of its prompt is used.
        first = states[:, 0]
        if self.parallel:
            return states.mean(1)
        return torch.where(_mask(inputs.has_actions, len(first), first.device)[:, None], states.mean(1), first)

    def set_gradient_checkpointing(self, every: int) -> None:
        """Recompute the activations of one block of each `every` in the backward pass; 0: of none."""
        self.vla.set_gradient_checkpointing(every)

    def block_classes(self) -> tuple[str, ...]:
        """Class names of the transformer blocks that FSDP shards one by one."""
        return self.vla.block_classes()


def _pick(hidden: Tensor, places: Tensor) -> Tensor:
    """(B, T, H) at (B, K) → (B, K, H)."""
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))


def _difference(found: Tensor, wanted: Tensor, has: Tensor) -> Tensor:
    """(B, …) float32 found − wanted, and zero with a zero gradient where masked, even if the values are NaN."""
    found = found.float()
    return found - torch.where(has[:, None, None], wanted.float(), found.detach())


def _mask(given: Tensor | None, size: int, device: torch.device) -> Tensor:
    return torch.ones(size, dtype=torch.bool, device=device) if given is None else given


def _check(config: OpenVLAConfig, cfg: PolicyConfig, sizes: PolicySizes) -> None:
    problems = []
    if cfg.proprio and not sizes.proprio_dim:
        problems.append("policy.proprio: the sources have no proprioception; set policy.proprio: false")
    if cfg.world is not None and sizes.target is None:
        problems.append("policy.world: there is no tokenizer that gives its targets; set policy.tokenizer")
    if not config.towers and sizes.patch_dim is None and sizes.state_dim is None:
        problems.append("policy.vision: stamo needs the StaMo tokenizer; set policy.tokenizer")
    if problems:
        raise RecipeError(problems)
