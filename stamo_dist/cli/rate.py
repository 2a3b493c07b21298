"""The learning rate over the steps of a run, past and future: in the terminal, and as a picture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from stamo_dist.checkpoint.retention import scan
from stamo_dist.errors import StamoError
from stamo_dist.optim.schedule import RateSchedule, continued
from stamo_dist.recipe.schema import Recipe
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.history import sample

_ROWS, _WIDTH, _POINTS = 20, 48, 1000
Points = list[tuple[int, float]]


def show_rate(recipe: Recipe, picture: Path | None) -> None:
    """Print the rate at some steps, and write the picture.

    Raises:
        StamoError: The picture cannot be written.
    """
    run = RunFolder(Path(recipe.run_dir))
    past, future = _past(run), _future(run, recipe)
    trained = past[-1][0] if past else 0
    ahead = [step for step in _steps(future) if step > trained]
    most = max([rate for _, rate in past] + [future.at(step) for step in ahead], default=0.0)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, side in (("step", "right"), ("learning rate", "right"), ("", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    rows = [(*past[i * (len(past) - 1) // max(1, _ROWS // 2 - 1)], "green") for i in range(_ROWS // 2)] if past else []
    rows += [(step, future.at(step), "cyan") for step in ahead]
    for step, rate, colour in dict.fromkeys(rows):
        table.add_row(f"{step:,}", f"{rate:.3g}", "█" * round(_WIDTH * rate / most), style=colour)
    console = Console(highlight=False)
    console.print(table)
    if past:
        console.print(f"to step {trained:,} as trained; after it as this recipe would go on")
    if picture is not None:
        _draw(
            picture,
            past,
            [(step, future.at(step)) for step in _steps(future, _POINTS) if not past or step > past[-1][0]],
        )
        console.print(f"wrote {picture}", soft_wrap=True)


def _steps(schedule: RateSchedule, count: int = _ROWS) -> list[int]:
    """Steps at equal distances, and those at which the rate turns."""
    last = schedule.steps
    turns = [schedule.warmup, last - schedule.decay] if schedule.shape == "wsd" else [schedule.warmup]
    return sorted({max(1, i * last // count) for i in range(count + 1)} | {turn for turn in turns if 0 < turn <= last})


def _future(run: RunFolder, recipe: Recipe) -> RateSchedule:
    """The schedule under which the run would go on from its newest checkpoint."""
    whole = scan(run.checkpoints).whole
    state = whole[0].manifest.state if whole else None
    if state is None or not state.schedule:
        return RateSchedule.of(recipe)
    return continued(RateSchedule.from_dict(state.schedule), recipe, state.updates)[0]


def _past(run: RunFolder) -> Points:
    lines = sample(run.metrics).objects if run.metrics.is_file() else []
    return [(line["step"], line["lr"]) for line in lines if line.get("lr") is not None]


def _draw(picture: Path, past: Points, ahead: Points) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="learning rate")
    for points, style, label in ((past, "-", "trained"), (ahead, "--" if past else "-", "to come")):
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    try:
        figure.savefig(picture, dpi=150, format=picture.suffix[1:] or "png")
    except (OSError, ValueError) as e:
        raise StamoError(f"{picture}: cannot be written: {e}") from e
