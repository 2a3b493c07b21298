"""A run folder made of a name lies in runs/."""

from __future__ import annotations

from pathlib import Path

import pytest

from stamo_dist.errors import RecipeError
from stamo_dist.launch.pipeline import load_pipeline
from stamo_dist.recipe.load import load

GOOD = "data: {sources: {a: {path: x}}}\ntrain: {steps: 1, global_batch: 1, micro_batch: 1}\n"
OUTSIDE = ["../../etc/x", "/etc/x", "a/../../b", "..", ".", "a//b", "a/", "a\\nb"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leaves_runs_is_refused_with_its_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f'{GOOD}name: "{name}"\n')
    with pytest.raises(
        RecipeError, match=r"r\.yaml:3: name: .* is no name of a folder in runs/.* set run_dir"
    ) as error:
        load(path)
    assert len(error.value.problems) == 1
    path.write_text(GOOD)
    with pytest.raises(RecipeError, match=r"--set name: .*is no name of a folder in runs/"):
        load(path, [f'name="{name}"'])


@pytest.mark.parametrize("name", OUTSIDE)
def test_pipelines_too(tmp_path: Path, name: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(f'name: "{name}"\nstages: {{a: {{train: vae_demo}}}}\n')
    with pytest.raises(RecipeError, match=r"p\.yaml:1: name: .* is no name of a folder in runs/"):
        load_pipeline(path, [], None)


def test_a_file_name_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "...yaml"
    path.write_text(GOOD)
    with pytest.raises(RecipeError, match="is no name of a folder in runs/"):
        load(path)


@pytest.mark.parametrize("name", ["plain", "a b", "ablation/no_noise", "étude-3.1", "..x"])
def test_others_are_names_below_runs(tmp_path: Path, name: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(f'{GOOD}name: "{name}"\n')
    assert load(path).recipe.run_dir == f"runs/{name}"
