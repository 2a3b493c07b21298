"""The encoding half of a StaMo tokenizer: encoder and compressor, without decoder and VAE."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from stamo_dist.models import weights
from stamo_dist.models.compressor import Compressor
from stamo_dist.models.encoder import Encoder
from stamo_dist.models.exported import FORMAT, check_parts, exported, read_compressor, read_encoder
from stamo_dist.models.tokenizer import Tokenizer
from stamo_dist.recipe import schema

log = logging.getLogger(__name__)


class StateEncoder(nn.Module):
    """Frames → patch features and state tokens, frozen. `fingerprint` is the whole tokenizer's."""

    def __init__(self, encoder: Encoder, compressor: Compressor, fingerprint: str):
        super().__init__()
        self.encoder, self.compressor, self.fingerprint = encoder, compressor, fingerprint
        self.requires_grad_(False).eval()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> StateEncoder:
        """The current parts of a tokenizer; computing the fingerprint reads all of its weights."""
        return cls(tokenizer.encoder, tokenizer.trained.compressor, tokenizer.fingerprint())

    @classmethod
    def from_pretrained(cls, folder: str | Path, encoder_weights: str | None = None) -> StateEncoder:
        """As `Tokenizer.from_pretrained`; the decoder's and VAE's weights are not read and may be missing.

        The fingerprint is the one recorded by the export. The two parts, which alone determine the states, are compared
        with it; for an export from before fingerprints were recorded, everything is read once and then freed.

        Raises:
            CheckpointError: files are missing or corrupt, or a part differs from the exported one.
        """
        root, about = exported(folder)
        if about["fingerprint"] is None:
            log.warning("%s: records no fingerprint, so all of it is read; `stamo export` writes one that does", root)
            return cls.of(Tokenizer.from_pretrained(folder, encoder_weights))
        cfg = schema.Model.model_validate(about["model"])
        encoder = read_encoder(root, cfg, encoder_weights)
        compressor = read_compressor(root, cfg, encoder.dim)
        found = {"encoder": encoder.fingerprint(), "compressor": compressor.fingerprint()}
        check_parts(found, about["sees"], root)
        return cls(encoder, compressor, about["fingerprint"])

    def save_pretrained(self, folder: Path, source: str | Path) -> None:
        """Write both parts, also a frozen encoder, so that `from_pretrained` reads `folder` alone.

        `source`: the tokenizer that it was read from, whose `stamo.json` says the rest.
        """
        about = exported(source)[1]
        folder.mkdir(parents=True)
        self.encoder.save_pretrained(folder / "encoder")
        weights.save(self.compressor.state_dict(), folder / "compressor" / "model.safetensors")
        sees = about["sees"] or {"encoder": self.encoder.fingerprint(), "compressor": self.compressor.fingerprint()}
        about = {"format": FORMAT, **about, "fingerprint": self.fingerprint, "sees": sees}
        (folder / "stamo.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @property
    def device(self) -> torch.device:
        return self.compressor.queries.device

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images → state tokens (B, tokens, dim) float32, those of `Tokenizer.encode`."""
        return self.compressor(self.encoder(images.to(self.device))).to(torch.float32)
