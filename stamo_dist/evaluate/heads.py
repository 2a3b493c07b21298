"""Heads that predict actions from motions, trained identically for every representation."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LINEAR, MLP = KINDS = ("linear", "MLP")
WIDTH, BATCH, LR, WEIGHT_DECAY = 256, 256, 1e-3, 1e-2
RULE = (
    f"MLP: two hidden layers of {WIDTH}, GELU. Both heads: AdamW, batch {BATCH}, learning rate {LR:g}, weight decay "
    f"{WEIGHT_DECAY:g}; the epoch is the best on a tenth of the training episodes, set aside."
)


@dataclass(frozen=True)
class Scale:
    """Affine map to standard units; dimensions that never change become 0."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Scale:
        std = rows.std(0)
        return cls(rows.mean(0), torch.where(std > 1e-6, std, torch.inf))

    def __call__(self, rows: Tensor) -> Tensor:
        return (rows - self.mean) / self.std

    @property
    def varies(self) -> Tensor:
        return self.std.isfinite()


class Head(nn.Module):
    """Motions (B, d) → actions in standard units (B, a). Inputs are centred and brought to unit variance over all."""

    mean: Tensor
    scale: Tensor

    def __init__(self, kind: str, inputs: Tensor, outputs: int):
        super().__init__()
        d = inputs.shape[1]
        self.register_buffer("mean", inputs.mean(0))
        # One factor for all dimensions: a factor for each would amplify those with noise only.
        self.register_buffer("scale", (inputs - inputs.mean(0)).square().mean().sqrt().clamp_min(1e-12))
        if kind == LINEAR:
            self.layers = nn.Sequential(nn.Linear(d, outputs))
        else:
            self.layers = nn.Sequential(
                nn.Linear(d, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, outputs)
            )

        for parameter in self.layers[-1].parameters():  # zero: the head starts by predicting the mean action
            nn.init.zeros_(parameter)

    def forward(self, motions: Tensor) -> Tensor:
        return self.layers((motions - self.mean) / self.scale)


def fit(
    kind: str, inputs: Tensor, targets: Tensor, episode: Tensor, *, seed: int, epochs: int, patience: int = 8
) -> Head:
    """Train a head on motions (n, d) and standardised actions (n, a) of at least two episodes (n,).

    The seed determines the initial weights, the order, and the validation episodes; training ends `patience` epochs
    after the best.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = episode.unique()
    aside = ids[torch.randperm(len(ids), generator=generator)[: max(1, len(ids) // 10)]]
    validating = torch.isin(episode, aside)
    x, y, x_val, y_val = inputs[~validating], targets[~validating], inputs[validating], targets[validating]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = Head(kind, x, y.shape[1]).to(x.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    best, waited, weights = float("inf"), 0, copy.deepcopy(head.state_dict())
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(BATCH):
            loss = (head(x[rows]) - y[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            score = (head(x_val) - y_val).square().mean().item()
        if score < best:
            best, waited, weights = score, 0, copy.deepcopy(head.state_dict())
        else:
            waited += 1
            if waited == patience:
                break
    head.load_state_dict(weights)
    return head.eval()


@torch.no_grad()
def error(head: Head, inputs: Tensor, targets: Tensor) -> float:
    """Mean squared error over samples and actions."""
    return (head(inputs) - targets).square().mean().item()
