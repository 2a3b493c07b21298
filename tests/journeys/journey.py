"""One whole journey of a toy run: begin, be stopped, go on elsewhere, end, export, open again, measure, report."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from forked import Ranks
from toy import write_recipe
from toy_policy import write_diffusion_recipe, write_policy_recipe

from stamo_dist.exit_codes import EXIT_PREEMPTED
from stamo_dist.faults.heartbeats import in_memory

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp")
STEPS = 10
_STOP_AT = 3
_TIMEOUT = 120.0
_OTHERS = ("stamo-watch-", "stamo-start-", "stamo-ranks-")  # in shared memory: of other tests
_ALWAYS = ("train.global_batch=12", "train.micro_batch=4", f"train.steps={STEPS}", "train.checkpoint.every=5")
_TOKENIZER_EVALS = (
    "reconstruct --frames 4", "interpolate --episodes 1 --points 3 --span 4", "transfer --pairs 1 --points 2 --span 4",
    "probe --k 2 --seeds 1 --epochs 2 --pixels 4",
)  # fmt: skip
#: What docs/ say that a run folder holds; STEP stands for any number.
_DOCUMENTED = re.compile(
    r"checkpoints/step_\d+/.+|model/.+|eval/.+|logs/.+|\.leases/\d+(\.json)?|"
    r"\.lock|(recipe|resolved)\.yaml|metrics\.jsonl|starts\.jsonl|env\.json|exported\.json|"
    r"(first_batch|mixture)\.png|report\.html"
)


@dataclass(frozen=True)
class Variant:
    """What is trained. `write` gets a folder and the strategy's name, and returns the recipe."""

    write: Callable[[Path, str], Path]
    settings: tuple[str, ...] = ()
    encode: bool = False
    evals: tuple[str, ...] = ()  # on two processes
    alone: tuple[str, ...] = ()  # those that know no --nproc


@dataclass
class Walked:
    """One line of the table; `problem` is empty where all went well."""

    variant: str
    strategy: str
    processes: int
    then: int
    seconds: float = 0.0
    problem: str = ""
    losses: list[float] = field(default_factory=list)


def variants(tokenizer: Path, vae: Path, policy: Path) -> dict[str, Variant]:
    """Every stage and kind, on the toy sources `tokenizer`, with the toy `vae`, and on what `policy` holds."""

    def toy(folder: Path, strategy: str) -> Path:
        return write_recipe(folder / "toy.yaml", tokenizer, vae, strategy=strategy)

    def openvla(actions: str) -> Callable[[Path, str], Path]:
        return lambda folder, strategy: write_policy_recipe(
            folder / "toy.yaml", policy, strategy=strategy, actions=actions, proprio=True
        )

    def diffusion(folder: Path, strategy: str) -> Path:
        return write_diffusion_recipe(folder / "toy.yaml", policy, strategy=strategy)

    found = {
        "vae": Variant(toy, ("stage=vae",)),
        "tokenizer": Variant(toy, evals=_TOKENIZER_EVALS, alone=("speed --calls 2 --batch 1",)),
        "tokenizer, cached": Variant(
            toy, ("data.latents=cached", "data.augment.brightness=0"), True, _TOKENIZER_EVALS,
            ("speed --calls 2 --batch 1",),
        ),
    }  # fmt: skip
    kinds = {"tokens": "tokens", "parallel tokens": "parallel_tokens", "regression": "regression"}
    writers = {name: openvla(actions) for name, actions in kinds.items()} | {"diffusion": diffusion}
    for name, write in writers.items():
        for cached in (False, True):
            for video in (False, True):
                settings = ("policy.targets=cached",) if cached else ()
                settings += () if video else ("data.sources.b.weight=0",)
                label = f"{name}{', cached' if cached else ''}{', video' if video else ''}"
                alone = ("actions --frames 4", "speed --calls 2 --batch 1")
                found[label] = Variant(write, settings, cached, (), alone)
    return found


def _sets(settings: tuple[str, ...]) -> list[str]:
    return [x for s in settings for x in ("--set", s)]


def losses(run: Path) -> list[float]:
    """Of every step, each once and in order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "a step is missing, or twice"
    return [line["loss"] for line in lines]


def straight(ranks: Ranks, variant: Variant, folder: Path) -> list[float]:
    """The losses of a run that nobody disturbs, under ddp on one process; what it reads encoded is encoded first."""
    recipe = variant.write(folder, "ddp")
    settings = _sets((*variant.settings, *_ALWAYS))
    if variant.encode:
        ranks(1, "encode", recipe, *settings)
    ranks(1, "train", recipe, *settings, timeout=_TIMEOUT)
    return losses(folder / "run")


def walk(ranks: Ranks, name: str, variant: Variant, strategy: str, processes: int, folder: Path,
         expected: list[float]) -> Walked:  # fmt: skip
    """Walk the whole way; what goes wrong is told in the result, with the end of the output."""
    walked, began = Walked(name, strategy, processes, processes % 3 + 1), time.monotonic()
    shared = _shared_memory()
    try:
        run = _walk(ranks, variant, walked, folder)
        walked.losses = losses(run)
        assert walked.losses == pytest.approx(expected, rel=2e-4), f"the losses are not ddp's: {walked.losses}"
        odd = [f for f in _files(run) if not _DOCUMENTED.fullmatch(f)]
        assert not odd, f"left in the run folder: {odd}"
        others = _shared_memory() - shared  # other runs on this machine are there too
        left = sorted(f for f in others if not f.startswith(_OTHERS) or f.startswith(in_memory(run / "logs")))
        left += [str(f) for f in ranks.shared.rglob("*")]
        assert not left, f"left in shared memory: {left}"
    except AssertionError as e:
        walked.problem = str(e)[-3000:]
    walked.seconds = round(time.monotonic() - began, 1)
    return walked


def _shared_memory() -> set[str]:
    """Its files but those that a process has open: all of the journey's have ended."""
    files = [p for p in Path("/dev/shm").iterdir() if not p.name.startswith("sem.")]  # those are there for a moment
    held = {path for pid in psutil.pids() for path in _open_files(pid)}
    return {p.name for p in files if str(p) not in held and p.exists()}


def _open_files(pid: int) -> Iterator[str]:
    for link in glob.glob(f"/proc/{pid}/fd/*") + glob.glob(f"/proc/{pid}/map_files/*"):
        with contextlib.suppress(OSError):  # it is closed, or not ours to look at
            yield os.readlink(link)


def _files(run: Path) -> list[str]:
    return sorted(str(f.relative_to(run)) for f in run.rglob("*") if not f.is_dir())


def _walk(ranks: Ranks, variant: Variant, walked: Walked, folder: Path) -> Path:
    recipe, run = variant.write(folder, walked.strategy), folder / "run"
    settings = (*variant.settings, *_ALWAYS)
    train, compare = ("train", recipe, *_sets(settings)), walked.strategy != "ddp"

    def call(processes: int, *arguments: object) -> str:
        said = ranks(processes, *arguments, timeout=_TIMEOUT)[1]
        assert "Traceback" not in said, said
        return said

    call(1, "recipe", "check", recipe, *_sets(settings))
    code, said = ranks(
        walked.processes, *train, check=False, compare=compare, stop=(run / "metrics.jsonl", _STOP_AT),
        timeout=_TIMEOUT,
    )  # fmt: skip
    assert code == EXIT_PREEMPTED, f"asked to stop, it left with {code}:\n{said}"
    code, said = ranks(walked.then, *train, compare=compare, timeout=_TIMEOUT)
    assert "continuing " in said, said
    assert (run / "exported.json").is_file(), said
    assert "already trained" in call(walked.processes, *train)
    call(1, "export", run, folder / "export")
    for command in variant.evals:
        call(2, "eval", *_put(command, run))
    for command in variant.alone:
        call(1, "eval", *_put(command, run))
    call(1, "report", run)
    assert (run / "report.html").stat().st_size > 10_000
    shutil.rmtree(folder / "export")
    return run


def _put(command: str, run: Path) -> list[str]:
    name, *options = command.split()
    return [name, str(run), *options]
