"""`recipes/pipelines/*.yaml`: several commands, each after the ones it needs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from stamo_dist.errors import RecipeError
from stamo_dist.recipe.find import find_recipe
from stamo_dist.recipe.layers import did_you_mean, merge
from stamo_dist.recipe.lines import Key, located, read_file, show_value
from stamo_dist.recipe.load import Loaded, load
from stamo_dist.recipe.run_name import check_name
from stamo_dist.recipe.schema import Recipe, Section
from stamo_dist.recipe.validate import place_of, repaired

PositiveInt = Annotated[int, Field(gt=0)]
_STAGES = ("data", "encode", "eval", "report")  # commands that a stage may run
_EVERY_GPU = ("encode",)  # those that divide their work over one process per GPU


class Stage(Section):
    """One command of a pipeline, or one run."""

    train: str | None = Field(None, description="Recipe to train; its path is relative to the working directory.")
    set: dict[str, Any] = Field(default_factory=dict, description="Fields of that recipe to override, by dotted name.")
    run: str | None = Field(None, description="Or a command line, as typed after `stamo`.")
    slices: PositiveInt | None = Field(
        None, description="`data convert` only: tasks of a job array that share the source."
    )
    after: list[str] | None = Field(
        None, description="Stages above that have to finish first; the one just above when omitted, [] for none."
    )
    cluster: str | None = Field(None, description="Profile of this stage; the pipeline's when omitted.")
    resources: dict[str, Any] = Field(default_factory=dict, description="Fields of the profile that it sets otherwise.")

    @model_validator(mode="after")
    def _is_one_thing(self) -> Stage:
        if (self.train is None) == (self.run is None):
            raise ValueError("give either train: RECIPE or run: COMMAND")
        if self.set and self.train is None:
            raise ValueError("set: is for stages with train: RECIPE; write --set into the command")
        if self.slices and (self.run or "").split()[:2] != ["data", "convert"]:
            raise ValueError("slices: only `data convert` can be shared out over the tasks of an array")
        return self

    @property
    def overrides(self) -> list[str]:
        return [f"{field}={show_value(value, limit=1 << 16)}" for field, value in self.set.items()]


class Pipeline(Section):
    """A pipeline."""

    name: str = Field("", description="Name of the pipeline; its file name when omitted.")
    run_dir: str = Field("", description="Folder for its record and the stages' logs; runs/NAME when omitted.")
    stages: dict[str, Stage] = Field(description="Name → stage, in the order in which they may start.")

    @field_validator("name")
    @classmethod
    def _below_runs(cls, name: str) -> str:
        return check_name(name)

    @field_validator("stages")
    @classmethod
    def _names(cls, stages: dict[str, Stage]) -> dict[str, Stage]:
        if not stages:
            raise ValueError("a pipeline has at least one stage")
        bad = [name for name in stages if not re.fullmatch(r"\w[\w-]*", name, re.ASCII)]
        if bad:
            raise ValueError(f"a stage's name has letters, digits, _ and - only, unlike {', '.join(map(repr, bad))}")
        return stages

    def misplaced(self) -> Iterator[tuple[str, str]]:
        """(stage, message) for each `after` that names no stage above."""
        names = list(self.stages)
        for i, (name, stage) in enumerate(self.stages.items()):
            for before in stage.after or []:
                if before not in names[:i]:
                    hint = did_you_mean(before, names[:i]) or f"there are: {', '.join(names[:i]) or 'none'}"
                    yield name, f"{before} is no stage above {name}; {hint}"

    def after(self, name: str) -> list[str]:
        """The stages that must finish before `name`."""
        given = self.stages[name].after
        above = list(self.stages)[: list(self.stages).index(name)]
        return above[-1:] if given is None else given


@dataclass(frozen=True)
class Work:
    """The work of one stage."""

    name: str
    stage: Stage
    run_dir: Path  # absolute
    words: list[str]  # of the command, after `stamo`; the recipe as it was given
    loaded: Loaded | None  # the recipe that it names
    after: list[str]
    makes: Path | None = None  # outputs that exist once it has finished
    reads: frozenset[Path] = frozenset()  # absolute: folders of data, weights and runs
    needs: frozenset[Path] = frozenset()  # those of data and runs, which are on this machine
    place: str = ""  # file and line of the stage

    @property
    def trains(self) -> bool:
        return self.stage.train is not None

    @property
    def every_gpu(self) -> bool:
        """Whether it runs one process per GPU; otherwise one process per task."""
        return self.trains or self.words[0] in _EVERY_GPU


def is_pipeline(path: Path) -> bool:
    """Whether the file has stages; any other file is taken for a recipe."""
    path = find_recipe(path)
    return path.is_file() and "stages" in read_file(path).value


def load_pipeline(path: Path, overrides: list[str], root: Any) -> tuple[Pipeline, list[Work]]:
    """Read a pipeline and all the recipes it names, and parse its command lines with `root`, the `stamo` command.

    Raises:
        RecipeError: With every problem, each with its file and line.
    """
    merged = merge(path, overrides)
    path = merged.path
    pipeline, wrong = repaired(Pipeline, merged)
    problems = [*merged.problems, *(problem for of_field in wrong.values() for problem in of_field)]
    if pipeline is None or not merged.whole:
        raise RecipeError(problems)
    name = pipeline.name or path.stem
    pipeline = pipeline.model_copy(update={"name": name, "run_dir": pipeline.run_dir or f"runs/{name}"})
    for stage_name, message in pipeline.misplaced():
        field: Key = ("stages", stage_name, "after")
        problems.append(located(place_of(field, merged.places), field, message))
    found = []
    for stage_name, stage in pipeline.stages.items():
        if any(("stages", stage_name, *field) in wrong for field in ((), ("train",), ("run",), ("set",))):
            continue  # a placeholder in its place
        try:
            work = _work(pipeline, stage_name, root)
            found.append(replace(work, place=place_of(("stages", stage_name), merged.places)))
        except (RecipeError, ValueError) as e:
            field = ("stages", stage_name, "train" if stage.train else "run")
            place = place_of(field, merged.places)
            problems += [located(place, field, p) for p in (e.problems if isinstance(e, RecipeError) else [str(e)])]
    shared: dict[Path, str] = {}
    for work in found:
        if work.trains and work.run_dir in shared:
            key: Key = ("stages", work.name)
            message = f"trains into {work.run_dir} as {shared[work.run_dir]} does; set run_dir"
            problems.append(located(place_of(key, merged.places), key, message))
        shared[work.run_dir] = work.name
    for work, other in [] if problems else _too_early(found):
        place = place_of(("stages", work.name, "after"), merged.places)
        message = f"{work.name} reads what {other} makes; add {other}, or a stage that comes after it"
        problems.append(located(place, ("stages", work.name, "after"), message))
    if problems:
        raise RecipeError(problems)
    return pipeline, found


def _too_early(works: Sequence[Work]) -> Iterator[tuple[Work, str]]:
    """(stage, earlier stage whose output it reads without depending on it)."""
    makers: dict[Path, str] = {}
    before: dict[str, set[str]] = {}
    for work in works:
        before[work.name] = {*work.after}.union(*(before.get(name, set()) for name in work.after))
        needed = dict.fromkeys(maker for path, maker in makers.items() if path in work.reads)
        yield from ((work, maker) for maker in needed if maker not in before[work.name])
        if made := work.run_dir if work.trains else work.makes:
            makers[made.absolute()] = work.name


def check_needs(works: Sequence[Work]) -> None:
    """Check that what each stage reads is there, or made by a stage above. A finished conversion needs no raw data.

    Raises:
        RecipeError: With all that is missing.
    """
    made, problems = set[Path](), list[str]()
    for work in works:
        if work.makes is None or not work.makes.exists():
            missing = (path for path in sorted(work.needs) if not path.exists() and not made & {path, *path.parents})
            for path in missing:
                message = f"{work.name} reads {path}, which is not there, and no stage above makes it"
                problems.append(located(work.place, ("stages", work.name), message))
        if output := work.run_dir if work.trains else work.makes:
            made.add(output.absolute())
    if problems:
        raise RecipeError(problems)


def _work(pipeline: Pipeline, name: str, root: Any) -> Work:
    stage, loaded, makes, needs = pipeline.stages[name], None, None, list[str]()
    folder = Path(pipeline.run_dir) / name
    if stage.train is not None:
        loaded = load(stage.train, stage.overrides)
        folder = Path(loaded.recipe.run_dir)
        words = ["train", stage.train, *(w for o in stage.overrides for w in ("--set", o))]
    else:
        words = shlex.split(stage.run or "")
        given = _parse(words, root)
        if "recipe" in given:
            loaded = load(given["recipe"], given["set_"])
        if words[:2] in (["data", "convert"], ["data", "simulate"]) and "://" not in str(given["out"]):
            makes = Path(given["out"])
        if words[0] in ("eval", "report"):
            needs += [given["run"]] if words[0] == "eval" else given["runs"]
        needs += [given[key] for key in ("src", "source") if words[0] == "data" and key in given]
    weights = list[str]()
    if loaded is not None:
        data = [path for source in loaded.recipe.data.used.values() for path in source.paths]
        needs += [*data, *([loaded.recipe.policy.tokenizer] if loaded.recipe.policy.tokenizer else [])]
        weights = _weights(loaded.recipe)
    there = _folders(needs)
    return Work(
        name, stage, folder.absolute(), words, loaded, pipeline.after(name), makes, there | _folders(weights), there
    )


def _folders(names: Iterable[str | Path]) -> frozenset[Path]:
    return frozenset(Path(name).expanduser().absolute() for name in names if "://" not in str(name))


def _weights(recipe: Recipe) -> list[str]:
    """Weights that a recipe names: folders, or models of the hub."""
    found = [getattr(recipe.model, part).weights for part in ("encoder", "decoder", "vae")]
    found += [recipe.policy.weights, recipe.init_from.path if recipe.init_from else None]
    return [path for path in found if path is not None]


def _parse(words: list[str], root: Any) -> dict[str, Any]:
    """The parameters of a command line.

    Raises:
        ValueError: It is not a valid `stamo` command, or not one allowed in a stage.
    """
    if not words or words[0] not in _STAGES:
        raise ValueError(f"a stage runs {', '.join(_STAGES)}; to train, write train: RECIPE")
    command, context, rest = root, root.make_context("stamo", list(words)), list(words)
    while hasattr(command, "get_command"):  # a group
        following = command.get_command(context, rest[0]) if rest else None
        if following is None:
            known = ", ".join(command.list_commands(context))
            raise ValueError(f"`{' '.join(words)}`: no such command; there are {known}")
        command, rest = following, rest[1:]
    try:
        return dict(command.make_context(words[0], rest).params)
    except Exception as e:
        if not hasattr(e, "format_message"):  # click's exceptions, which typer re-exports under a private name
            raise
        raise ValueError(f"`{' '.join(words)}`: {e.format_message()}") from None
