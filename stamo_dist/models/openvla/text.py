"""Prompts, the text tokenizer of a checkpoint, and training sequences with action tokens at their end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from stamo_dist.errors import CheckpointError, DataError
from stamo_dist.models.openvla.network import IGNORE

TOKENIZER = "tokenizer.json"
Style = Literal["openvla", "v01"]
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_SPACE, _BOS, _EOS, _UNKNOWN, _PAD = "▁", "<s>", "</s>", "<unk>", "<PAD>"
_BLOCK = 64  # the network's vocabulary size is a multiple of it


def prompt(instruction: str, style: Style = "openvla") -> str:
    """The prompt before the actions; `v01`: the format of openvla-v01 (Vicuna).

    Raises:
        DataError: the instruction is empty.
    """
    if not instruction.strip():
        raise DataError("a sample has no instruction; name its source's task or leave the source out")
    question = f"What action should the robot take to {instruction.lower()}?"
    return f"In: {question}\nOut:" if style == "openvla" else f"{_VICUNA} USER: {question} ASSISTANT:"


@dataclass(frozen=True)
class Encoded:
    """A batch of prompts, optionally followed by actions, padded on the right."""

    input_ids: Tensor  # (B, L) int64
    attention_mask: Tensor  # (B, L) bool
    labels: Tensor  # (B, L) int64; -100 except at action ids and </s>
    prompts: Tensor  # (B,) int64: ids of each prompt, BOS and the space behind it included

    def to(self, device: torch.device | str) -> Encoded:
        return Encoded(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


class TextTokenizer:
    """Instructions → prompt ids, by the `tokenizer.json` that lies beside a checkpoint's weights."""

    def __init__(self, tokenizer: Tokenizer, pad: int, style: Style = "openvla", source: str = TOKENIZER):
        """`pad` is the padding id of the checkpoint's config.json.

        Raises:
            CheckpointError: the tokenizer lacks one of the tokens of Llama's vocabulary.
        """
        self.tokenizer, self.pad, self.style = tokenizer, pad, style
        found = {token: tokenizer.token_to_id(token) for token in (_BOS, _EOS, _SPACE)}
        if absent := [token for token, i in found.items() if i is None]:
            raise CheckpointError(f"{source}: has no token {', '.join(absent)}; give the tokenizer of the checkpoint")
        self.bos, self.eos, self.space = found[_BOS], found[_EOS], found[_SPACE]

    @classmethod
    def from_folder(cls, folder: Path, pad: int, style: Style = "openvla") -> TextTokenizer:
        """Read `tokenizer.json` of a checkpoint folder.

        Raises:
            CheckpointError: the file is missing, cannot be read or is not Llama's.
        """
        path = folder / TOKENIZER
        if not path.is_file():
            raise CheckpointError(f"{folder} has no {TOKENIZER}; copy the tokenizer of the checkpoint there")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no narrower exception
            raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from error
        return cls(tokenizer, pad, style, str(path))

    @classmethod
    def from_instructions(cls, instructions: Iterable[str], *, size: int = 512, bins: int = 256) -> TextTokenizer:
        """A small Llama-style byte-pair tokenizer learnt from these instructions, for policies without weights.

        The last `bins` ids are action tokens and the padding follows them, so a network of `size + 64` ids with
        `pad_token_id: size` and `pad_to_multiple_of: 64` fits.

        Raises:
            ValueError: `size` is not a multiple of 64, or too small for the characters and actions.
        """
        special = [_UNKNOWN, _BOS, _EOS]
        texts = [prompt(i) for i in instructions]
        letters = sorted({c for text in texts for c in text.replace(" ", _SPACE)} | {_SPACE})
        if size % _BLOCK or size < len(special) + len(letters) + bins:
            raise ValueError(
                f"size {size} is no multiple of {_BLOCK} that holds {len(letters)} letters, {bins} actions"
            )
        tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
        tokenizer.pre_tokenizer = pre_tokenizers.Split(_SPACE, "merged_with_next")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=size - bins, special_tokens=special, initial_alphabet=letters, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        spare = size - bins - tokenizer.get_vocab_size()
        names = [f"<spare_{i}>" for i in range(spare)] + [f"<action_{i}>" for i in range(bins)]
        tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
        tokenizer.add_special_tokens([_PAD])
        return cls(tokenizer, size)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`, and the files that transformers' AutoTokenizer also needs."""
        self.tokenizer.save(str(folder / TOKENIZER))
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _BOS,
            "eos_token": _EOS,
            "unk_token": _UNKNOWN,
            "pad_token": self.tokenizer.id_to_token(self.pad),
            "padding_side": "right",
            "model_max_length": 2048,
            "clean_up_tokenization_spaces": False,
        }
        about = {key: value for key, value in about.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def check(self, vocabulary: int, most: int, source: str) -> None:
        """Check that it fits a network of `vocabulary` ids, `most` including padding.

        Raises:
            CheckpointError: it does not fit.
        """
        size = self.tokenizer.get_vocab_size()
        if not vocabulary <= size <= most:
            raise CheckpointError(
                f"{source}: {TOKENIZER} has {size} ids, but the network's vocabulary is {vocabulary}, padded to "
                f"{most}; give the tokenizer of the checkpoint"
            )

    def prompt_ids(self, instruction: str) -> list[int]:
        """BOS, the prompt, and the lone space (29871 in Llama's vocabulary) that precedes the first action."""
        ids = [self.bos, *self.tokenizer.encode(prompt(instruction, self.style), add_special_tokens=False).ids]
        return with_space(ids, self.space)

    def encode(
        self, instructions: Sequence[str], actions: Sequence[np.ndarray | None] | None = None, *, blanks: int = 0
    ) -> Encoded:
        """Prompts alone, or each followed by its action ids (any shape) and </s>.

        If a sample has no actions, its prompt is followed by `blanks` placeholders and </s>, for a parallel policy,
        or by nothing; its labels are ignored.
        """
        rows: list[SampleIds] = []
        for i, instruction in enumerate(instructions):
            ids = None if actions is None else actions[i]
            tail = [self.bos] * blanks if ids is None else np.ravel(ids).tolist()
            rows.append(SampleIds(self.prompt_ids(instruction), [*tail, self.eos] if tail else [], ids is not None))
        return collate(rows, self.pad)


def with_space(ids: list[int], space: int) -> list[int]:
    """A prompt's ids with the lone space at their end, if it is not there."""
    return ids if ids[-1] == space else [*ids, space]


class SampleIds(NamedTuple):
    """The ids of one sample."""

    prompt: list[int]
    tail: list[int]  # action ids or placeholders, and </s>
    labelled: bool


def collate(rows: Sequence[SampleIds], pad: int) -> Encoded:
    """Samples → a batch, padded on the right."""
    lengths = [len(row.prompt) + len(row.tail) for row in rows]
    shape = (len(rows), max(lengths))
    input_ids = torch.full(shape, pad, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    for i, row in enumerate(rows):
        input_ids[i, : lengths[i]] = torch.tensor([*row.prompt, *row.tail])
        if row.labelled:
            labels[i, len(row.prompt) : lengths[i]] = torch.tensor(row.tail)
    return Encoded(input_ids, input_ids != pad, labels, torch.tensor([len(row.prompt) for row in rows]))
