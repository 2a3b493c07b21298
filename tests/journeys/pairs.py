"""Options in pairs: toy runs in which every two values of two options meet once, but for those that are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from covertable import make
from forked import Ranks
from toy import write_recipe
from toy_policy import on_base, write_diffusion_recipe, write_policy_recipe

Row = Mapping[str, str]
STRATEGY = ("ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp")
_TIMEOUT = 600.0  # torch.compile on a busy CPU

#: Option → its values → what the recipe says of them. The first value says nothing.
COMMON: dict[str, dict[str, tuple[str, ...]]] = {
    "strategy": {name: (f"strategy.name={name}",) for name in STRATEGY},
    "precision": {"fp32": (), "bf16": ("train.precision=bf16",)},
    "ema": {"no": (), "yes": ("train.ema=0.9",)},
    "compile": {"no": (), "yes": ("train.compile=true",)},
    "recompute": {"no": (), "yes": ("train.gradient_checkpointing=true",)},
    "micro-batch": {"2": (), "4": ("train.micro_batch=4",)},
    "saves": {"waited for": (), "background": ("train.checkpoint.background=true",)},
    "workers": {"0": (), "1": ("data.workers=1",), "2": ("data.workers=2",)},
    "augment": {"no": (), "brightness": ("data.augment.brightness=0.1",), "openvla": ("data.augment.preset=openvla",)},
    "virtual": {"no": (), "2": ("train.virtual_workers=2",)},
    "bad samples": {"raise": (), "skip": ("data.on_bad_sample=skip",)},
    "processes": {"2": (), "1": ()},
}
TOKENIZER = COMMON | {
    "latents": {"online": (), "cached": ("data.latents=cached",)},
    "posterior": {"mean": (), "sample": ("model.vae.latent=sample",)},
    "evaluate": {"no": (), "yes": ("evaluate.every=2", "evaluate.reconstruct=2")},
    "encoder": {"at once": (), "later": ("optimizer.encoder_start=2",)},
}
_POLICY: dict[str, dict[str, tuple[str, ...]]] = {
    "targets": {"online": (), "cached": ("policy.targets=cached",)},
    "views": {"1": (), "2": ("data.views=2", "policy.views=2")},
    "proprio": {"no": (), "yes": ("policy.proprio=true",)},
    "video": {"no": ("data.sources.b.weight=0",), "yes": ()},
}
OPENVLA = COMMON | _POLICY | {
    "actions": {
        "tokens": (), "parallel tokens": ("policy.actions=parallel_tokens",),
        "regression": ("policy.actions=regression",),
    },
    "start": {
        "random": (), "weights": (), "lora": ("policy.lora.rank=2",), "no language": ("policy.freeze.language=true",),
        "no projector": ("policy.freeze.projector=true",),
    },
    "sees": {"both": (), "patches": ("policy.stamo=patches",), "states": ("policy.stamo=states",)},
    "world": {
        "motion": (), "state": ("policy.world.target=state",), "dinov2": ("policy.world.target=dinov2",),
        "none": ("policy.world=null",),
    },
}  # fmt: skip
DIFFUSION = COMMON | _POLICY | {
    "sees": {"states": (), "patches": ("policy.stamo=patches",)},
    "pseudo": {
        "motion": (), "pixels": ("policy.diffusion.pseudo=pixels",), "none": ("policy.diffusion.pseudo=none",),
        "step": ("policy.diffusion.pseudo_per=step",),
    },
}  # fmt: skip
_VAE = {option: values for option, values in COMMON.items() if option not in ("compile", "recompute")}
OPTIONS = {"vae": _VAE, "tokenizer": TOKENIZER, "openvla": OPENVLA, "diffusion": DIFFUSION}


@dataclass(frozen=True)
class Refusal:
    """Values that do not go together: `recipe check` refuses them by this field."""

    field: str
    values: Mapping[str, Sequence[str]]

    def holds(self, row: Row) -> bool:
        return all(option in row and row[option] in values for option, values in self.values.items())

    def condition(self) -> dict[str, object]:
        """That it does not hold, for the generator."""
        each = [{"operator": "in", "left": option, "values": list(these)} for option, these in self.values.items()]
        return {"operator": "not", "condition": {"operator": "and", "conditions": each}}


_VIRTUAL = Refusal("train.virtual_workers", {"virtual": ["2"], "strategy": STRATEGY[1:]})
_COMPILED = Refusal("train.compile", {"compile": ["yes"], "strategy": ["zero3"]})
_AUGMENTED = Refusal("policy.targets", {"targets": ["cached"], "augment": ["brightness", "openvla"]})
REFUSED = {
    "vae": (_VIRTUAL,),
    "tokenizer": (
        _VIRTUAL, _COMPILED,
        Refusal("data.latents", {"latents": ["cached"], "augment": ["brightness", "openvla"]}),
        Refusal("data.latents", {"latents": ["cached"], "posterior": ["sample"]}),
    ),
    "openvla": (
        _VIRTUAL, _COMPILED, _AUGMENTED,
        Refusal("policy.targets", {"targets": ["cached"], "world": ["dinov2"]}),
    ),
    "diffusion": (
        _VIRTUAL, _COMPILED, _AUGMENTED,
        Refusal("policy.targets", {"targets": ["cached"], "pseudo": ["pixels"]}),
        Refusal("policy.targets", {"targets": ["cached"], "pseudo": ["none"], "sees": ["patches"]}),
        Refusal("policy.diffusion.pseudo_per", {"targets": ["online"], "pseudo": ["step"]}),
    ),
}  # fmt: skip


def rows(stage: str) -> list[dict[str, str]]:
    """The runs in which all pairs meet that are not refused."""
    factors = {option: list(values) for option, values in OPTIONS[stage].items()}
    return list(make(factors, constraints=[refusal.condition() for refusal in REFUSED[stage]]))


def missed(stage: str, those: Sequence[Row]) -> list[dict[str, str]]:
    """The pairs of values that no row has and no refusal explains."""
    options, refusals = OPTIONS[stage], REFUSED[stage]
    pairs = [
        {one: a, other: b} for one, other in combinations(options, 2) for a in options[one] for b in options[other]
    ]
    pairs = [pair for pair in pairs if not any(pair.items() <= row.items() for row in those)]
    return [pair for pair in pairs if not any(refusal.holds(pair) for refusal in refusals)]


def refused(stage: str) -> list[tuple[dict[str, str], str]]:
    """A row for each value that is refused beside others, else of first values; and the field that is named.

    So are the pairs in which no run can meet, as each needs what the other refuses; by which field is left open.
    """
    options, out = OPTIONS[stage], []
    for refusal in REFUSED[stage]:
        last, values = list(refusal.values.items())[-1]
        for value in values:
            row = {option: next(iter(choices)) for option, choices in options.items()}
            row |= {option: choices[0] for option, choices in refusal.values.items()} | {last: value}
            out.append((row, refusal.field))
    first = {option: next(iter(choices)) for option, choices in options.items()}
    return out + [(first | pair, "") for pair in missed(stage, rows(stage))]


@dataclass(frozen=True)
class Toys:
    """What the runs read: two cameras, everything encoded."""

    shards: Path
    vae: Path
    policy: Path
    base: Path

    def write(self, stage: str, row: Row, folder: Path) -> tuple[Path, list[str]]:
        """The recipe of a row, and its settings."""
        if stage == "diffusion":
            recipe = write_diffusion_recipe(folder / "toy.yaml", self.policy, proprio=False)
        elif stage == "openvla":
            recipe = write_policy_recipe(folder / "toy.yaml", self.policy)
            if row["start"] != "random":
                on_base(recipe, self.base)
        else:
            recipe = write_recipe(folder / "toy.yaml", self.shards, self.vae)
            recipe.write_text(recipe.read_text().replace("  augment: {brightness: 0.1}\n", ""))
        settings = ["train.steps=5", "train.checkpoint.every=2"]
        settings += [f"stage={stage}"] if stage == "vae" else []
        settings += [s for option, value in row.items() for s in OPTIONS[stage][option][value]]
        return recipe, [x for s in settings for x in ("--set", s)]

    def encode(self, ranks: Ranks, folder: Path) -> None:
        """Everything that a row may read encoded."""
        for stage, wanted in (
            ("tokenizer", {"latents": "cached"}),
            ("diffusion", {"targets": "cached", "video": "yes"}),
        ):
            row = {option: next(iter(values)) for option, values in OPTIONS[stage].items()}
            recipe, settings = self.write(stage, row | wanted, folder / stage)
            ranks(1, "encode", recipe, *settings)


def run(ranks: Ranks, toys: Toys, stage: str, row: Row, folder: Path) -> str:
    """What is wrong with a row that should run; nothing if it does as `recipe check` says."""
    recipe, settings = toys.write(stage, row, folder)
    code, said = ranks(1, "recipe", "check", recipe, *settings, check=False)
    if code:
        return f"refused: {said}"
    try:
        said = ranks(
            int(row["processes"]), "train", recipe, *settings, compare=row["strategy"] != "ddp", timeout=_TIMEOUT
        )[1]  # fmt: skip
    except AssertionError as e:
        return str(e)
    if "Traceback" in said or not (folder / "run/exported.json").is_file():
        return said
    return ""


def refuse(ranks: Ranks, toys: Toys, stage: str, row: Row, field: str, folder: Path) -> str:
    """What is wrong with a row that should be refused by this field."""
    recipe, settings = toys.write(stage, row, folder)
    code, said = ranks(1, "recipe", "check", recipe, *settings, check=False)
    return "" if code == 2 and f"{field}" in said and "Traceback" not in said else f"exit {code}: {said}"
