"""The commands of README.md and docs/, and a folder in which they run as they stand on toys of the same names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from toy import make_source, write_recipe
from toy_policy import on_base, write_diffusion_recipe, write_policy_recipe

from stamo_dist.data.schema import EPISODES, MANIFEST
from stamo_dist.recipe.load import load
from stamo_dist.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: What is not run here, and what does run it.
ELSEWHERE = {
    r"^(make|pip|cat|cd|git|export|caddy|srun|sbatch|torchrun|curl|docker|python|OUT=)": "no command of ours alone",
    r"stamo data (simulate|formats)": "tests/tools",
    r"stamo data convert": "tests/tools, each format's own",
    r"s3://|hf://": "tests/tools/test_bucket_sources.py, tests/data/test_remote.py",
    r"stamo (eval rollout|eval plan|eval during)": "tests/evaluate, with the simulators",
    r"(openvla|moojink)/|weights/": "tests/publish, tests/models: needs released weights",
    r"stamo serve": "tests/serve: it does not end",
    r"stamo submit .*--cluster (local|gpu)(?!.*--dry-run)": "tests/launch, tests/slurm",
    r"stamo (doctor|cancel|resume|logs)|--watch": "tests/launch, tests/slurm: a running job",
    r"stamo chaos": "tests/chaos",
    r"--against": "tests/tools/test_check_against.py",
    r"train\.steps=200_000": "tests/training: hours",
    r"recipes/my_(trimmed_)?mix\.yaml": "tests/cli/test_recipe_commands.py",
}
#: Where a toy has fewer steps, or there is no GPU.
TINY = {"step_00000200": "step_00000010", "--branch 20000": "--branch 10", "--device cuda": "--device cpu"}
#: Toys in place of what the pages talk about.
TOKENIZERS = ("runs/my_run", "runs/cls", "runs/tokenizer_sim", "runs/my_other_run", "demo/runs/tokenizer",
              "demo/runs/doors", "demo/runs/probe", "demo/runs/probe_bent")  # fmt: skip
POLICIES = ("runs/my_policy", "runs/policy_openvla_state", "runs/policy_openvla", "demo/runs/policy_openvla_state")
SHARDS = ("libero", "metaworld", "mine", "libero_goal", "doors", "drawer_open", "metaworld_few")


@dataclass(frozen=True)
class Command:
    page: str
    text: str

    @property
    def elsewhere(self) -> str:
        return next((why for pattern, why in ELSEWHERE.items() if re.search(pattern, self.text)), "")

    def words(self) -> list[str]:
        """Its arguments, on one process, its recipe the toy where it is trained or encoded."""
        text = re.sub(r"--(nproc|processes) \d+", "", self.text)
        for given, toy in TINY.items():
            text = text.replace(given, toy)
        words = shlex.split(text)[1:]
        offline = {"explain", "schema", "plan", "submit", "--offline"} & set(words)
        return words if offline else [re.sub(r"^recipes/", "toys/", word) for word in words]


def commands() -> list[Command]:
    """Every line of a shell's block of every page."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), re.DOTALL):
            block = re.sub(r"<<'END'\n.*?\nEND\n", "\n", block, flags=re.DOTALL)
            for line in block.replace("\\\n", " ").splitlines():
                text = re.sub(r"\s#.*", "", line).strip()
                if text and not text.startswith("#"):
                    found.append(Command(page.stem, text))
    return found


def write_toys(folder: Path, source: Path, prepared: Path, base: Path, vae: Path) -> None:
    """toys/NAME.yaml for every recipe of the repository: its stage, kind, sources' names and run folder.

    The sources are copies of `source`; `prepared` is what `make_policy_data` made, and policies begin from `base`.
    """
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe, toy = load(path).recipe, folder / "toys" / path.name
        _write(recipe, toy, folder, prepared, base, vae)
        text = re.sub(r"run_dir: .*", f"run_dir: {recipe.run_dir}", toy.read_text())
        head, _, rest = text.partition("  sources:\n")
        kept = re.sub(r"^    [ab]: .*\n", "", rest, count=2, flags=re.MULTILINE)
        sources = [
            f"    {name}: {{path: toy_sources/{name}{'' if source.actions else ', actions: false'}}}\n"
            for name, source in recipe.data.sources.items()
        ]
        toy.write_text(f"{head}  sources:\n{''.join(sources)}{kept}")
        for name in recipe.data.sources:
            _copy(source, folder / "toy_sources" / name)
    readme = (ROOT / "README.md").read_text()
    (folder / "toys" / "doors.yaml").write_text(re.findall(r"<<'END'\n(.*?)\nEND\n", readme, re.DOTALL)[0])
    (folder / "toys" / "my_recipe.yaml").write_text("extends: tokenizer_demo.yaml\nname: mine\nrun_dir: runs/mine\n")


def _write(recipe: Recipe, toy: Path, folder: Path, prepared: Path, base: Path, vae: Path) -> None:
    if recipe.policy is None:
        write_recipe(toy, folder, vae)
        if recipe.stage == "vae":
            toy.write_text("stage: vae\n" + re.sub(r"(?s)model:.*?train:\n", "train:\n", toy.read_text()))
    elif recipe.policy.diffusion is not None:
        write_diffusion_recipe(toy, prepared)
    else:
        on_base(write_policy_recipe(toy, prepared, actions=recipe.policy.actions), base)


def make_original(root: Path) -> Path:
    """A source whose table has the instructions of its shards; it lacks statistics."""
    source = make_source(root, "original", episodes=3)
    for table in source.glob("*/" + EPISODES):
        lines = [json.loads(line) | {"instruction": "move the square"} for line in table.read_text().splitlines()]
        table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return source


def _copy(source: Path, folder: Path) -> None:
    if not folder.exists():
        shutil.copytree(source, folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | {"name": folder.name}))


def furnish(folder: Path, source: Path, tokenizer: Path, policy: Path) -> None:
    """Recipes, and the shards and runs that the pages take for granted: of `tokenizer` and `policy`, finished runs."""
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    for name in SHARDS:
        for parent in ("shards", "data/shards", "demo/shards"):
            _copy(source, folder / parent / name)
    for runs, made in ((TOKENIZERS, tokenizer), (POLICIES, policy)):
        for run in runs:
            shutil.copytree(made, folder / run)


