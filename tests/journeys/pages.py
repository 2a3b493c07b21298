"""The commands of README.md and docs/, and folders in which they run: recipes of the same names, small."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from toy import make_source

from stamo_dist.data.schema import EPISODES
from stamo_dist.recipe.load import load
from stamo_dist.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: What is not run here, by a pattern of its beginning, and why, or what does run it.
ELSEWHERE = {
    r"make |pip |export |caddy |torchrun |srun |sbatch ": "installs, or is another machine's",
    r"OUT=day benchmarks/gpu_day.sh|python benchmarks/roofline.py": "tests/tools/test_gpu_day.py, tests/plan",
    r"python benchmarks/(one_policy|cotraining|world_head).py": "hours; what they call: tests/evaluate",
    r"tensorboard ": "does not end; what it reads: tests/training/test_trackers.py",
    r"stamo data simulate (?!metaworld demo/raw/doors)": "tests/tools/test_simulate.py",
    r"stamo data convert .*(s3|hf)://|stamo (data )?(sync|check) .*s3://": "tests/tools/test_bucket_sources.py",
    r"stamo data convert (?!metaworld demo/raw/doors)": "tests/tools, a file a format",
    r"stamo data check .* --against": "tests/tools/test_check_source.py",
    r"stamo eval (plan|rollout)": "tests/evaluate/test_closed_loop.py",
    r"stamo eval during": "tests/evaluate/test_during.py",
    r"stamo (eval actions|serve) weights/|stamo serve my-lab/": "weights that others made: tests/models, tests/serve",
    r"stamo export .* --(push|format openvla)": "tests/publish",
    r"stamo (status runs/demo|runs demo/runs/tokenizer/sweep)$": "tests/slurm/test_pipeline.py, tests/launch",
    r"stamo doctor .*--cluster gpu": "Slurm: tests/slurm",
    r"stamo status .*--watch|stamo logs runs/tokenizer_sim": "of a job: tests/slurm/test_watch.py, tests/launch",
    r"stamo (cancel|resume) ": "a job: tests/launch/test_local_submit.py, tests/slurm",
    r"stamo chaos |python benchmarks/chaos_slurm.py": "tests/chaos, tests/slurm/test_chaos_jobs.py",
    r"stamo init |stamo train recipes/vae.yaml": "tests/cli/test_wheel.py",
}
#: What runs with other words: fewer steps than the pages speak of, no GPU, not for hours.
TINY = {
    "step_00000200": "step_00000002", "--branch 20000": "--branch 2", "--device cuda": "--device cpu",
    "train.steps=200_000": "train.steps=6", "--set policy.vision=fused --set data.image_size=224": "",
    "--set policy.weights=null": "", "stamo demo": "stamo demo --dry-run",
    "eval reconstruct": "eval reconstruct --frames 8", "eval interpolate": "eval interpolate --episodes 1",
    "eval transfer": "eval transfer --pairs 1", "eval probe": "eval probe --seeds 1 --epochs 2 --episodes 2",
    "eval speed": "eval speed --calls 2", "--seeds 3": "", "--calls 30": "",
    "--nproc 8": "--nproc 1", "--processes 8": "--processes 2", "--episodes 10 --size 128": "--episodes 2 --size 128",
}  # fmt: skip
STEPS, SIZE = 4, 64


#: The exit code of those that end with another than 0.
CODES = {"--resume none": 2, "stamo recipe diff": 1}


@dataclass(frozen=True)
class Command:
    """A command of a page, with what follows `<<'END'`."""

    page: str
    text: str

    @property
    def elsewhere(self) -> str:
        return next((why for pattern, why in ELSEWHERE.items() if re.match(pattern, self.text)), "")

    @property
    def only_plans(self) -> bool:
        """Whether it reads recipes of full size, and runs nothing of them."""
        plans = r"--cluster gpu|--offline|^stamo (demo|plan|recipe (explain|schema|list|show \w+$))"
        return bool(re.search(plans, self.text))

    @property
    def code(self) -> int:
        return next((code for part, code in CODES.items() if part in self.text), 0)

    def words(self) -> list[str]:
        """Its arguments, as they run here."""
        text = self.text
        for given, tiny in TINY.items():
            text = text.replace(given, tiny)
        submits = self.page != "README" and text.startswith("stamo submit ")
        return [*shlex.split(text)[1:], *["--dry-run"][:submits]]


def commands() -> list[Command]:
    """Every command of a shell's block of every page, each once a page."""
    found: dict[Command, None] = {}
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
            for text in re.findall(r"[^\n]*<<'END'\n.*?\nEND\n|[^\n]+", block.replace("\\\n", " "), re.DOTALL):
                line = text if "<<" in text else " ".join(re.sub(r"(^|\s)#.*", "", text).split())
                if line:
                    found[Command(page.stem, line)] = None
    return list(found)


def sources(recipes: Iterable[Recipe]) -> set[str]:
    """The folders of their shards."""
    return {path for recipe in recipes for config in recipe.data.sources.values() for path in config.paths}


def write_small(folder: Path) -> None:
    """`folder`/recipes/NAME.yaml for every recipe of the repository: of few steps, and of the demo's models.

    So is base/tokenizer.yaml, from which the pages' examples are.
    """
    (folder / "recipes/base").mkdir(parents=True)
    whole = {path.name: path for path in sorted(RECIPES.glob("*.yaml"))}
    for name, path in {**whole, "base/tokenizer.yaml": whole["tokenizer_sim.yaml"]}.items():
        small = {"extends": str(RECIPES / name)} | _small(load(path).recipe)
        (folder / "recipes" / name).write_text(yaml.safe_dump(small))


def write_examples(folder: Path) -> list[Path]:
    """The recipes that pages write out, as the files that their first lines name."""
    written = []
    for page in PAGES:
        for name, text in re.findall(r"```yaml\n# (recipes/\S+\.yaml)\n(.*?)```", page.read_text(), re.DOTALL):
            (folder / name).write_text(text)
            written.append(folder / name)
    return written


def _small(recipe: Recipe) -> dict[str, Any]:
    """What makes a recipe small."""
    train = {"steps": STEPS, "global_batch": 4, "micro_batch": 2, "precision": "fp32", "compile": False}
    train["checkpoint"] = {"every": STEPS // 2, "keep": 9}
    small: dict[str, Any] = {
        "train": train, "data": {"workers": 0}, "optimizer": {"warmup_steps": 2}, "tracking": {"wandb": "off"},
    }  # fmt: skip
    if recipe.data.image_size == SIZE:
        return small
    small["data"]["image_size"] = SIZE
    like = {"tokenizer": "tokenizer_demo", "policy": "policy_openvla_state_demo"}[recipe.stage]
    if recipe.stage == "policy" and recipe.policy.diffusion is not None:
        like = "policy_rdt_1real_4video_demo"
    demo = load(RECIPES / f"{like}.yaml").recipe
    if recipe.stage == "tokenizer":
        return small | {"model": demo.model.model_dump(mode="json")}
    policy = demo.policy.model_dump(mode="json")
    if recipe.policy.diffusion is None:
        policy |= {"weights": "base", "config": {}, "actions": recipe.policy.actions}
        policy["lora"] = recipe.policy.lora and recipe.policy.lora.model_dump(mode="json")
    return small | {"policy": policy}


def make_sources(root: Path, folders: Iterable[str], size: int) -> None:
    """A source in each of these folders, its table with the instructions of its shards; they lack statistics."""
    for folder in map(Path, folders):
        source = make_source(
            root / folder.parent, folder.name, episodes=5, length=10, size=size, cameras=("agentview",),
            shard_bytes=1 << 20,
        )  # fmt: skip
        for table in source.glob("*/" + EPISODES):
            lines = [json.loads(line) | {"instruction": "move the square"} for line in table.read_text().splitlines()]
            table.write_text("".join(json.dumps(line) + "\n" for line in lines))
