"""Beginning a run with the weights of another run or of a model: what of them goes where, under every strategy.

Each process reads the ranges that it holds. A parent is read only by a start without a checkpoint of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from stamo_dist.checkpoint.parent import FIELD, ParentWeights, locate, open_parent
from stamo_dist.checkpoint.resize import fits, of_name, resized
from stamo_dist.checkpoint.source import Source, batches, put_back
from stamo_dist.distributed import ranges
from stamo_dist.distributed.engine import Engine
from stamo_dist.distributed.ranges import AVERAGE, WEIGHT, Range
from stamo_dist.errors import CheckpointError, RecipeError, RunError
from stamo_dist.pretrained.place import hub_id
from stamo_dist.recipe.init_from import InitFrom, if_frozen
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run import lineage
from stamo_dist.run.lineage import Parent

_VLA = {"vision_backbone": "vision", "language_model": "language"}
_RANDOM = "random initial weights"  # in a task's notes
Shape = tuple[int, ...]


def find(recipe: Recipe, run: Path, say: Callable[[str], None]) -> str | None:
    """Rank 0, before anything is written: where the weights lie that the run is to begin with, verified.

    Raises:
        StamoError: There are none, they are damaged or of another stage, or come from this run.
    """
    if recipe.init_from is None:
        return None
    try:
        recipe.init_from.check_other(run)
    except ValueError as e:
        raise RunError(f"{FIELD}: {e}") from None
    own, location = run.resolve(), locate(recipe.init_from, recipe.stage, say)
    parent = open_parent(location, recipe.init_from)
    line = [Path(parent.run), *(Path(p.run) for p in lineage.ancestors(Path(parent.run)))]
    if own in line:
        circle = " → ".join(map(str, [own, *line[: line.index(own) + 1]]))
        raise RunError(f"{FIELD}: goes round in a circle ({circle}); choose another run_dir")
    return location


def open_initial(recipe: Recipe, location: str | None) -> Initial | None:
    """On every process: the weights that `find` found."""
    if recipe.init_from is None or location is None:
        return None
    return Initial(recipe, recipe.init_from, open_parent(location, recipe.init_from))


def without_effect(recipe: Recipe, recorded: str | None) -> list[str]:
    """Notes of a start that goes on from a checkpoint, which records what the run began with."""
    if recipe.init_from is None:
        return [f"{FIELD}: this run began with {recorded}"] if recorded else []
    given = recipe.init_from.path
    if recorded is None:
        return [f"{FIELD}: {given} has no effect: this run began without it, and goes on from its checkpoint"]
    begun, hub = re.sub(r" \([^()]*\)$", "", recorded), hub_id(given)
    path = str(Path(given).expanduser().resolve())
    same = begun == path or begun.startswith(f"{path}/") or (hub is not None and begun.startswith(f"{hub[0]}@"))
    if same:
        return [f"{FIELD}: this run began with {recorded}, which is not read again"]
    return [f"{FIELD}: {given} has no effect: this run began with {recorded}"]


def resumed_notes(stage: str, module: nn.Module, notes: Sequence[str]) -> tuple[str, ...]:
    """A task's notes on how its parts were built, in a start that goes on from a checkpoint of `module`."""
    parts = {part_of(stage, name) for name, _ in module.named_parameters()}
    return _weights_from("the checkpoint", parts, stage == "policy", notes)


def _weights_from(where: str, parts: Iterable[str], policy: bool, notes: Sequence[str]) -> tuple[str, ...]:
    """`notes`, in which these parts, and with `policy` the policy as a whole, have no random weights any more."""
    said = (*(f"model.{part}: " for part in parts), *(("policy: ",) if policy else ()))
    return tuple(n.replace(_RANDOM, f"weights of {where}") if n.startswith(said) else n for n in notes)


def part_of(stage: str, name: str) -> str:
    """The part of the recipe's model that a parameter belongs to."""
    if stage == "vae":
        return "vae"
    first, _, rest = name.partition(".")
    if stage == "tokenizer":
        return first
    if first == "vla":
        second = rest.partition(".")[0]
        return _VLA.get(second, second)
    return first if first in ("action_head", "proprio_projector", "world_head") else "policy"


@dataclass
class _PartCount:
    """(tensors, elements) of a part, by what becomes of them."""

    loaded: list[int] = field(default_factory=lambda: [0, 0])
    resized: list[int] = field(default_factory=lambda: [0, 0])
    fresh: list[int] = field(default_factory=lambda: [0, 0])
    ignored: list[int] = field(default_factory=lambda: [0, 0])

    def __str__(self) -> str:
        found = [
            f"{kind} {tensors} tensors ({elements:,} parameters)"
            for kind, (tensors, elements) in vars(self).items()
            if tensors
        ]
        return ", ".join(found)


@dataclass
class InitialPlan:
    """What becomes of the module's tensors and the parent's."""

    taken: dict[str, str] = field(default_factory=dict)  # tensor of the module → of the parent
    resized: dict[str, Shape] = field(default_factory=dict)  # tensor of the module → its shape
    parts: dict[str, _PartCount] = field(default_factory=dict)

    def count(self, part: str, kind: str, shape: Shape) -> None:
        counted = getattr(self.parts.setdefault(part, _PartCount()), kind)
        counted[0] += 1
        counted[1] += torch.Size(shape).numel()


class Initial:
    """A parent's weights, on their way into a new run."""

    def __init__(self, recipe: Recipe, cfg: InitFrom, parent: ParentWeights):
        self._recipe, self._cfg, self._parent = recipe, cfg, parent
        self._source: Source | None = None
        self._plan = InitialPlan()

    @property
    def described(self) -> str:
        return self._parent.described

    @property
    def record(self) -> Parent:
        """What the run folder records."""
        return Parent("init", self._parent.run, self._parent.step, self._parent.weights)

    @property
    def may_give_all(self) -> bool:
        """Whether random weights of the large part need no memory, as they would be replaced."""
        large = {"tokenizer": ("decoder", self._recipe.model.decoder), "policy": ("policy", self._recipe.policy)}
        part, section = large.get(self._recipe.stage, ("", None))
        return section is not None and section.weights is None and _wanted(self._cfg, part)

    @property
    def needs_frames(self) -> bool:
        """Whether what depends on data (a compressor's standardisation) is fresh."""
        return not self._taken_of("compressor")

    def meet(self, module: nn.Module) -> bool:
        """Decide what goes where, before the module is distributed.

        Returns False if the module, built `unfilled`, lacks memory for what is not given.

        Raises:
            RecipeError: Parts that one of the two lacks, or that do not go without another.
            CheckpointError: Tensors have other shapes, or none is the same.
        """
        self._source = self._parent.open(module)
        self._plan = _plan(self._cfg, self._recipe.stage, self._source, ranges.shapes(module), self._parent.run)
        if self._recipe.stage == "tokenizer":
            self._check_standardised()
        empty = [name for name, p in module.named_parameters() if p.is_meta]
        return not self.may_give_all or all(name in self._plan.taken for name in empty)

    def _check_standardised(self) -> None:
        cfg = self._recipe.model.compressor
        if self.needs_frames and cfg.standardise and self._taken_of("encoder"):
            why = "an encoder without its compressor is not standardised"
            raise RecipeError([f"{FIELD}.parts: {why}; take compressor too, or set model.compressor.standardise: 0"])
        if not self.needs_frames and cfg.whiten and "compressor.state_map" not in self._plan.taken:
            raise RecipeError([f"model.compressor.whiten: {self._parent.run} does not whiten its states; set false"])

    def gives_all(self, module: nn.Module) -> bool:
        """Whether other weights need not be read."""
        return all(name in self._plan.taken for name, _ in module.named_parameters())

    @torch.no_grad()
    def load(self, engine: Engine) -> None:
        """Read this process's ranges, the optimizer's master copies among them; every process calls it."""
        assert self._source is not None, "it has met the module"
        ranges.before_reading(engine)
        held = [*ranges.trained_ranges(engine), *ranges.other_ranges(engine)]
        taken = self._plan.taken
        for some in batches([r for r in held if r.name in taken and r.name not in self._plan.resized]):
            self._source.fill([self._as_stored(r, self._source) for r in some])
        for r in held:
            if r.name in self._plan.resized and (whole := self._resized(r.name)) is not None:
                target = r.flat(WEIGHT)
                target.copy_(whole.reshape(-1)[r.start : r.start + r.numel])
                put_back(target, r.parts[WEIGHT])
        ranges.publish(engine)

    def _as_stored(self, r: Range, source: Source) -> Range:
        name = self._plan.taken[r.name]
        return replace(r, name=name, parts={self._kind(name, source): r.parts[WEIGHT]})

    def _kind(self, name: str, source: Source) -> str:
        averaged = self._parent.weights == "averaged" and source.dtype(AVERAGE, name) is not None
        return AVERAGE if averaged else WEIGHT

    def _resized(self, name: str) -> torch.Tensor | None:
        assert self._source is not None, "it has met the module"
        stored = self._plan.taken[name]
        whole = torch.empty(self._source.shapes[stored])
        self._source.fill([Range(stored, 0, whole.numel(), {self._kind(stored, self._source): whole})])
        return resized(name, whole, self._plan.resized[name])

    def notes(self, frozen: Mapping[str, str]) -> list[str]:
        """What the user is told first; `frozen`: fingerprints of the run's frozen parts, by name."""
        of = "" if self._parent.step is None else f" of step {self._parent.step}"
        lines = [f"{FIELD}: {self.described}{of}", *(f"  {note}" for note in self._parent.notes)]
        lines += [f"  {part}: {counts}" for part, counts in self._plan.parts.items()]
        given = {"decoder": self._recipe.model.decoder.weights, "encoder": self._recipe.model.encoder.weights}
        if self._recipe.stage == "policy":
            given = {"policy": self._recipe.policy.weights}
        lines += [
            f"  {part}.weights: {named} gives way to {FIELD} where both have a tensor"
            for part, named in given.items()
            if named is not None and (part == "policy" or self._taken_of(part))
        ]
        return lines + [
            f"  the {name} differs ({was[:12]} → {frozen[name][:12]}): what was trained with the other may not fit it"
            for name, was in self._parent.frozen.items()
            if name in frozen and frozen[name][:12] != was[:12]
        ]

    def corrected(self, notes: Sequence[str]) -> tuple[str, ...]:
        """A task's notes on how its parts were built, of which some have no random weights any more."""
        begun = [part for part, counts in self._plan.parts.items() if counts.loaded[0] and not counts.fresh[0]]
        whole = len(begun) == len(self._plan.parts)
        return _weights_from(FIELD, begun, whole and self._recipe.stage == "policy", notes)

    def _taken_of(self, part: str) -> bool:
        return any(part_of(self._recipe.stage, name) == part for name in self._plan.taken)


def _plan(cfg: InitFrom, stage: str, source: Source, shapes: Mapping[str, Shape], run: str) -> InitialPlan:
    plan, wrong = InitialPlan(), list[str]()
    _check_parts(cfg, stage, source, shapes, run)
    for name, shape in shapes.items():
        part, stored = part_of(stage, name), _stored_name(name, source)
        if stored is None or not _wanted(cfg, part):
            plan.count(part, "fresh", shape)
            continue
        has, entry = source.shapes[stored], of_name(name)
        if has == shape:
            plan.count(part, "loaded", shape)
        elif entry is not None and entry in cfg.resize and fits(name, has, shape):
            plan.resized[name] = shape
            plan.count(part, "resized", shape)
        else:
            takes = entry is not None and entry not in cfg.resize and fits(name, has, shape)
            hint = f" ({FIELD}.resize: [{entry}] takes it)" if takes else ""
            wrong.append(f"{name}: {list(has)} in the parent, {list(shape)} in the recipe{hint}")
        plan.taken[name] = stored
    if wrong:
        lines = "".join(f"\n  - {line}" for line in wrong)
        raise CheckpointError(f"{FIELD}: {len(wrong)} tensors of {run} have another shape:{lines}")
    if not plan.taken:
        raise CheckpointError(f"{FIELD}: {run} has none of the tensors that the recipe trains; it is another model")
    used = set(plan.taken.values())
    for name, shape in source.shapes.items():
        if name not in used:
            if ".lora_" in name:
                raise CheckpointError(
                    f"{FIELD}: {run} has adapters (policy.lora), which the recipe has not; give its export, RUN/model"
                )
            plan.count(part_of(stage, name), "ignored", shape)
    return plan


def _wanted(cfg: InitFrom, part: str) -> bool:
    return cfg.parts is None or part in cfg.parts or "policy" in cfg.parts


def _stored_name(name: str, source: Source) -> str | None:
    """A layer with an adapter has its weights under a longer name."""
    names = (name, name.replace(".base_layer.", "."))
    return next((n for n in names if n in source.shapes), None)


def _check_parts(cfg: InitFrom, stage: str, source: Source, shapes: Mapping[str, Shape], run: str) -> None:
    here = dict.fromkeys(part_of(stage, name) for name in shapes)
    there = dict.fromkeys(part_of(stage, name) for name in source.shapes)
    whole = ("policy",) if stage == "policy" else ()
    problems = []
    for part in cfg.parts or ():
        if part not in (*here, *whole):
            problems.append(f"{FIELD}.parts: {part}: the recipe trains {', '.join(here)}{if_frozen(part, stage)}")
        elif part not in (*there, *whole):
            problems.append(f"{FIELD}.parts: {part}: {run} has {', '.join(there)}")
    if problems:
        raise RecipeError(problems)
