"""Checks of a recipe before it starts: whether its data, its weights and what is installed here fit it. No torch."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stamo_dist.data import at_hand
from stamo_dist.data.schema import read_manifest
from stamo_dist.errors import DataError, RecipeError, RunError
from stamo_dist.extras import how_to_install, is_installed
from stamo_dist.launch.ends import newest_step
from stamo_dist.launch.further import FURTHER
from stamo_dist.pretrained.place import ABOUT, cached, download, hub_id, is_offline, meant
from stamo_dist.pretrained.wanted import look_at
from stamo_dist.recipe.batching import batching
from stamo_dist.recipe.difference import resolved_of
from stamo_dist.recipe.load import Draft, Loaded, load_draft
from stamo_dist.recipe.unread import unread
from stamo_dist.run.folder import RunFolder

EXPORTED = "stamo.json"  # file that identifies an exported tokenizer


@dataclass(frozen=True)
class Looked:
    """Result of the checks of a recipe.

    Attributes:
        problems: What training refuses.
        notes: What may be unintended.
        to_download: (field, problem, remedy) of weights that the run would have to download.
        advice: How its data are used.
    """

    problems: list[str]
    notes: list[str]
    to_download: list[tuple[str, str, str]]
    advice: list[str]


@dataclass(frozen=True)
class Scope:
    """What is looked at.

    Attributes:
        environment: Variables that the run will have besides this process's.
        world_size: Also check that the global batch and hsdp's groups divide over this many processes.
        asked: The option that gave `world_size`, for messages.
        offline: Skip data and weights, which are not on this machine, and packages.
        trains: The recipe is trained next; False for `stamo encode`, which makes what training reads.
        packages: The run has this Python's packages; False for a run in a container.
        advise: Also look at how the data of stages other than policies are used, which takes numpy.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    world_size: int | None = None
    asked: str = ""
    offline: bool = False
    trains: bool = True
    packages: bool = True
    advise: bool = False


def read(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """As `recipe.load.load`; of a wrong recipe, what `look` finds in the rest of it is raised too.

    Raises:
        RecipeError: All of it. A valid recipe's data and weights are not looked at.
    """
    draft = load_draft(path, overrides)
    if draft.loaded is not None and not draft.problems:
        return draft.loaded
    raise RecipeError(look(draft).problems)


def refuse(draft: Draft, scope: Scope = Scope()) -> tuple[Loaded, Looked]:
    """As `look`, but problems are raised.

    Raises:
        RecipeError: All missing or wrong items.
    """
    looked = look(draft, scope)
    if draft.loaded is None or looked.problems:
        raise RecipeError(looked.problems)
    return draft.loaded, looked


def look(draft: Draft, scope: Scope = Scope()) -> Looked:
    """Check a recipe without starting it, for `stamo train`, `submit`, `doctor` and `recipe check`.

    Of a wrong recipe, what depends on its wrong values is not looked at.
    """
    loaded = draft.loaded
    if loaded is None:
        return Looked(draft.problems, [], [], [])
    problems, notes = list[str](), list(_notes(loaded))
    if scope.world_size is not None:
        try:
            batching(loaded.recipe.train, scope.world_size)
            loaded.recipe.strategy.check_processes(scope.world_size)
        except ValueError as e:
            option = f"{scope.asked} {scope.world_size}: " if scope.asked else ""
            problems.append(option + _located(loaded, str(e)))
    advice, downloads = list[str](), list[tuple[str, str, str]]()
    if not scope.offline:
        unusable, advice = _data(loaded, scope, draft)
        problems += unusable
        if "stage" not in draft.wrong:
            environ = {**os.environ, **scope.environment}
            looked = weights(loaded, environ)
            problems += [*_initial(loaded, environ), *looked.problems, *_policy(loaded)]
            problems += _to_encode(loaded) if scope.trains else ()
            notes += [*_outdated(loaded), *_initial_of_hub(loaded)]
            downloads = looked.to_download
        problems += _not_installed(loaded) if scope.packages else ()
        problems += _run_folder(loaded) if scope.trains else ()
    found = [problem for problem in _apart_from(draft.wrong, problems) if problem not in draft.problems]
    return Looked([*draft.problems, *found], notes, downloads, advice)


def _apart_from(wrong: Collection[str], problems: Sequence[str]) -> list[str]:
    """The problems that name none of the fields."""
    names = [re.compile(rf"(?<![\w./-]){re.escape(field)}(?=[.:;, ]|$)") for field in wrong]
    return [problem for problem in problems if not any(name.search(problem) for name in names)]


def _data(loaded: Loaded, scope: Scope, draft: Draft) -> tuple[list[str], list[str]]:
    """(problems of the data, how they are used)."""
    data, problems, advice = loaded.recipe.data, list[str](), list[str]()
    policy = loaded.recipe.stage == "policy"  # of other stages nothing more is refused
    for further in FURTHER:
        if draft.doubtful.isdisjoint(further.reads) and (policy or scope.advise):
            try:
                advice += further.look(loaded.recipe)
            except RecipeError as e:
                problems += [_located(loaded, problem) for problem in e.problems]
    found = [_placed(loaded, misfit.field, misfit.text) for misfit in at_hand.look(data)]
    if not problems and "data" not in draft.doubtful:
        problems = [_placed(loaded, misfit.field, misfit.text) for misfit in at_hand.too_far(data)]
    return [*found, *problems], advice


def _notes(loaded: Loaded) -> Iterator[str]:
    yield from unread(loaded)
    warmup, steps = loaded.recipe.optimizer.warmup_steps, loaded.recipe.train.steps
    if warmup >= steps:
        text = f"optimizer.warmup_steps: {warmup} steps of warm-up in a run of {steps}: it never reaches optimizer.lr"
        yield _placed(loaded, "optimizer.warmup_steps", text)
    elif (o := loaded.recipe.optimizer).schedule == "wsd" and (decay := o.decay_of(steps)) > (left := steps - warmup):
        text = f"optimizer.decay_steps: {decay} are more than the {left} steps after the warm-up: it is shorter"
        yield _placed(loaded, "optimizer.decay_steps", text)


def _has_checkpoints(loaded: Loaded) -> bool:
    try:
        return any((Path(loaded.recipe.run_dir) / "checkpoints").glob("step_*"))
    except OSError:  # `_run_folder` says so
        return False


def _run_folder(loaded: Loaded) -> Iterator[str]:
    try:
        RunFolder(Path(loaded.recipe.run_dir)).check()
    except RunError as e:
        yield _located(loaded, str(e))


def _initial(loaded: Loaded, environ: Mapping[str, str]) -> Iterator[str]:
    """Check that the weights are there that the run begins with, unless it goes on from a checkpoint of its own."""
    initial = loaded.recipe.init_from
    if initial is None:
        return
    field, given = _placed(loaded, "init_from.path"), Path(initial.path).expanduser()
    try:
        initial.check_other(Path(loaded.recipe.run_dir))
    except ValueError as e:
        yield f"{field}: {e}"
        return
    if _has_checkpoints(loaded):
        return
    if (hub := hub_id(initial.path)) is not None and _from_hub(initial.path):
        if is_offline(environ) and not any(cached(*hub, [""], environ, name) for name in ABOUT):
            where = f"is no folder here{meant(initial.path)}, nor in the hub's cache, and HF_HUB_OFFLINE is set"
            yield f"{field}: {initial.path} {where}; `{download(*hub)}` where there is network, or give a folder"
        return
    if "://" in initial.path:
        yield f"{field}: {initial.path}: copy it here first (stamo sync {initial.path} FOLDER), and give its folder"
        return
    if not given.is_dir():
        yield f"{field}: there is no folder {initial.path}; give a run, a checkpoint or an exported model"
        return
    run = next((p for p in (given, *given.parents[:2]) if RunFolder(p).resolved.is_file()), None)
    of = (resolved_of(RunFolder(run).resolved) or {}).get("stage") if run else None
    if of not in (None, loaded.recipe.stage):
        weights = f"; model.vae.weights: {run} names its VAE" if of == "vae" else ""
        yield f"{field}: {initial.path} is of the {of} stage, and the recipe trains the {loaded.recipe.stage}{weights}"


def _initial_of_hub(loaded: Loaded) -> Iterator[str]:
    initial = loaded.recipe.init_from
    if initial is not None and _from_hub(initial.path) and not _has_checkpoints(loaded):
        field, near = _placed(loaded, "init_from.path"), meant(initial.path)
        yield f"{field}: {initial.path} is no folder here{near}, and is taken for a repository of the Hub"


def _to_encode(loaded: Loaded) -> Iterator[str]:
    """What `stamo encode` has to write before the training."""
    for missing in at_hand.to_encode(loaded, every=not _has_checkpoints(loaded)):
        yield _placed(loaded, missing.field, missing.text)


def _not_installed(loaded: Loaded) -> Iterator[str]:
    field = "tracking.tensorboard"
    if loaded.recipe.tracking.tensorboard and not is_installed("tensorboard"):
        yield f"{_placed(loaded, field)}: the package tensorboard is not installed; {how_to_install('tensorboard')}"


def _outdated(loaded: Loaded) -> Iterator[str]:
    """Exports of runs that were trained further since."""
    recipe = loaded.recipe
    read = {
        "tokenizer": {
            "model.vae.weights": recipe.model.vae.weights,
            "model.decoder.weights": recipe.model.decoder.weights,
        },
        "vae": {"model.vae.weights": recipe.model.vae.weights},
        "policy": {"policy.tokenizer": recipe.policy.tokenizer, "policy.weights": recipe.policy.weights},
    }
    for name, given in read[recipe.stage].items():
        path = Path(given or "").expanduser()
        run = path.parent if path.name == "model" else path
        exported, newest = RunFolder(run).exported_step, newest_step(run) if given else None
        if given and exported is not None and newest is not None and exported < newest:
            text = f"{given} was exported after step {exported}, and its run has a checkpoint of step {newest}"
            yield f"{_placed(loaded, name)}: {text}; `stamo export {run}` exports that"


@dataclass(frozen=True)
class Weights:
    """Problems of a recipe's weights, and (field, problem, remedy) of those to be downloaded."""

    problems: list[str]
    to_download: list[tuple[str, str, str]]


def weights(loaded: Loaded, environ: Mapping[str, str] = os.environ) -> Weights:
    """Check the headers of all weights that the stage reads; offline, weights missing on this machine are problems."""
    if _has_checkpoints(loaded):  # the run reads the weights of the commit that it began with, which they name
        return Weights([], [])
    looked = look_at(loaded.recipe, environ)
    problems = [p.replace(field, _placed(loaded, field), 1) for field, found in looked.problems.items() for p in found]
    absent = [
        (
            _placed(loaded, field),
            f"{repo} is not in the hub's cache{meant(repo)}",
            f"`{command}` here, into a cache that the nodes see, or give a folder that is there",
        )
        for field, (repo, command) in looked.absent.items()
    ]
    if not is_offline(environ):
        return Weights(problems, absent)
    return Weights([*problems, *(f"{f}: {what}, and HF_HUB_OFFLINE is set; {fix}" for f, what, fix in absent)], [])


def _policy(loaded: Loaded) -> Iterator[str]:
    """Check a policy's further needs: its tokenizer, and the statistics of actions."""
    recipe, policy = loaded.recipe, loaded.recipe.policy
    if recipe.stage != "policy":
        return
    folder = policy.tokenizer
    if folder is not None and (policy.world is not None or policy.vision == "stamo"):
        root = Path(folder).expanduser()
        if not _from_hub(folder) and not any((place / EXPORTED).is_file() for place in (root, root / "model")):
            field = _placed(loaded, "policy.tokenizer")
            yield f"{field}: {folder} holds no tokenizer that was trained to its end; `stamo submit` its recipe first"
    for name, source in recipe.data.used.items():
        for path in source.paths if source.actions else ():
            with contextlib.suppress(DataError):
                manifest = read_manifest(Path(path).expanduser())
                if manifest.action_dim and "action" not in manifest.stats:
                    field = _placed(loaded, f"data.sources.{name}.path")
                    yield f"{field}: {path} has no statistics of its actions; `stamo data stats {path}` makes them"


def _from_hub(given: str) -> bool:
    """Whether it is a hub id, and no path beside whose last part there are others."""
    return hub_id(given) is not None and not Path(given).parent.is_dir()


def _placed(loaded: Loaded, field: str, text: str | None = None) -> str:
    """The text, by default the field, after what set the field: a file's line, or `--set`."""
    place, text = loaded.origin(field), field if text is None else text
    if place == "default":
        return text
    return place if place == f"--set {text}" else f"{place}: {text.removeprefix(place.removeprefix('--set ') + ': ')}"


def _located(loaded: Loaded, text: str) -> str:
    """A text that begins with a field, after the place of that field."""
    return _placed(loaded, text.partition(":")[0], text)
