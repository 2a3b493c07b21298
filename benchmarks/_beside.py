"""What a benchmark measured, beside what stamo_dist.plan predicts of the same step; lines that begin with » are all."""

from __future__ import annotations

from typing import Any

from stamo_dist.device import Device
from stamo_dist.plan import roofline
from stamo_dist.plan.memory import plan
from stamo_dist.recipe.schema import Recipe


def gpu() -> roofline.GPU:
    """This process's, where the roofline knows it; an H100, so that there is a prediction, where it does not."""
    by_name = {known.name: known for known in roofline.GPUS}
    return next((known for part, known in by_name.items() if part in Device.current().name), by_name["H100"])


def beside(what: str, measured: float | None, predicted: float | None, unit: str, *, other: str = "predicted") -> None:
    """Print both and their ratio; None is what could not be measured or predicted. `other`: what the second one is."""
    said = "not measured" if measured is None else f"{measured:,.4g} {unit}"
    if predicted is not None:
        ratio = "" if measured is None else f", × {measured / predicted:.2f}"
        said += f", {other} {predicted:,.4g} {unit}{ratio}"
    print(f"» {what}: {said}", flush=True)


def beside_plan(what: str, recipe: Recipe, rate: float, peak: float | None) -> None:
    """Samples/s and bytes at the peak of one GPU, beside what is predicted of a recipe."""
    card = gpu()
    here = card.name in Device.current().name
    (expected,), (memory,) = roofline.expect(recipe, 1, [card]), plan(recipe, 1)
    note = "" if here else f" (predicted: an {card.name}, which this is not)"
    beside(f"{what}, speed{note}", rate, expected.samples_per_second, "samples/s")
    if here:
        beside(f"{what}, MFU", 100 * rate * useful(expected) / card.flops, 100 * expected.mfu, "%")
    beside(f"{what}, peak", None if peak is None else peak / 1e9, memory.peak / 1e9, "GB")


def useful(expected: roofline.Expected) -> float:
    """FLOPs of a sample."""
    return expected.useful_flops / expected.samples


def fits(recipe: Recipe) -> str | None:
    """Why one of this machine's devices has no room for the recipe's step; None where it has, or is a CPU."""
    (memory,), capacity = plan(recipe, 1), Device.current().capacity
    if capacity is None or memory.peak < 0.95 * capacity:
        return None
    return f"needs {memory.peak / 1e9:.0f} GB, {Device.current().name} has {capacity / 1e9:.0f}"


def row(label: str, rate: float, flops: float, peak: float | None, reference: float | None) -> list[Any]:
    """Cells: label, samples/s, MFU, peak GB, × the plain loop."""
    most = Device.current().peak_flops
    return [
        label, f"{rate:.2f}", "–" if most is None else f"{rate * flops / most:.1%}",
        "–" if peak is None else f"{peak / 1e9:.1f}", "–" if reference is None else f"{rate / reference:.2f}",
    ]  # fmt: skip
