"""How long a step of each full-size recipe should take, by part and by class of operator: predictions, no measurement.

    python benchmarks/roofline.py                                                   # the recipes below on 8 GPUs
    python benchmarks/roofline.py recipes/policy_oft_state.yaml --gpus 16 --set train.micro_batch=8

The calculation is stamo_dist.plan.roofline's, over the operators of the traced step: each takes the longer of its
arithmetic at a share of the GPU's peak and of its bytes at a share of the memory's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

import stamo_dist.models  # noqa: F401  # isort: skip  must precede transformers
from stamo_dist.plan import roofline
from stamo_dist.plan.memory import plan
from stamo_dist.recipe.load import load

RECIPES = Path(__file__).parents[1] / "recipes"
FULL = {
    "tokenizer_sim_droid": ([], ["data.latents=cached"]),
    "policy_openvla_state": ([],),
    "policy_openvla_lora": ([],),
    "policy_oft_state": ([],),
    "policy_rdt_1real_4video": ([],),
}


def show(path: Path, gpus: int, settings: list[str], console: Console) -> None:
    recipe = load(path, settings).recipe
    (memory,), found = plan(recipe, gpus), roofline.expect(recipe, gpus)
    said = " ".join([path.stem, *settings])
    table = Table(title=f"{said} on {gpus} GPUs: {memory.peak / 1e9:.1f} GB of each, micro-batch {memory.micro_batch}")
    for column in ("prediction", *(step.gpu for step in found)):
        table.add_column(column, justify="left" if column == "prediction" else "right")
    table.add_row("step, ms", *(f"{step.seconds * 1e3:.1f}" for step in found))
    table.add_row("samples/s", *(f"{step.samples_per_second:,.0f}" for step in found))
    table.add_row("MFU", *(f"{step.mfu:.1%}" for step in found))
    for kind in ("by_part", "by_class"):
        table.add_section()
        for name in getattr(found[0], kind):
            table.add_row(f"{name}, ms", *(f"{getattr(step, kind).get(name, 0) * 1e3:.1f}" for step in found))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--set", action="append", default=[])
    a = parser.parse_args()
    console = Console(highlight=False)
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in roofline.EFFICIENCY.items())
    console.print(
        f"Assumed: of the peak {shares} (attention backward {roofline.ATTENTION_BACKWARD:.0%}), "
        f"{roofline.BANDWIDTH:.0%} of the memory's bandwidth, {roofline.LINK:.0%} of the links'. No GPU has run this."
    )
    listed = [(path, [[]]) for path in a.recipes] or [(RECIPES / f"{name}.yaml", rows) for name, rows in FULL.items()]
    for path, rows in listed:
        for settings in rows:
            show(path, a.gpus, [*settings, *a.set], console)


if __name__ == "__main__":
    main()
