"""`stamo recipe …` and the page docs/mix-data.md, whose every command runs here as written."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stamo_dist.cli.recipe import app
from stamo_dist.errors import RecipeError, StamoError
from stamo_dist.recipe.explain import json_schema
from stamo_dist.recipe.fields import all_fields
from stamo_dist.recipe.load import load

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "160")


def run(*args: str) -> str:
    result = CliRunner().invoke(app, args)
    if result.exception:
        raise result.exception
    return result.output


def test_login_nodes_need_no_torch():
    code = "import sys, stamo_dist.cli.recipe; sys.exit(str({'torch', 'numpy'} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_show_is_a_recipe_with_the_origin_of_every_value(tmp_path):
    recipe = "recipes/tokenizer_demo.yaml"
    out = run("show", recipe, "--set", "train.steps=7")
    assert re.search(r"^  steps: 7 +# --set$", out, re.MULTILINE)
    assert re.search(r"^      path: demo/shards/libero +# recipes/mixtures/demo\.yaml:\d+$", out, re.MULTILINE)
    assert re.search(r"^seed: 0 +# default$", out, re.MULTILINE)
    (tmp_path / "shown.yaml").write_text(out)
    assert load(tmp_path / "shown.yaml").recipe == load(recipe, ["train.steps=7"]).recipe


def test_check_prints_shares_and_batching():
    out = run("check", "recipes/tokenizer_sim_droid.yaml", "--world-size", "8", "--offline")
    assert out.startswith("OK ")
    assert "droid 50.0%" in out
    assert re.search(r"^ +8 +96 = +96 × 1$", out, re.MULTILINE)


def test_check_lists_the_sizes_that_share_the_virtual_workers():
    settings = ("--set", "train.virtual_workers=4", "--set", "strategy.name=ddp")
    out = run("check", "recipes/tokenizer_sim_droid.yaml", "--offline", *settings)
    assert re.findall(r"^ +(\d+) +\d+ = ", out, re.MULTILINE) == ["1", "2", "4"]


def test_check_lists_what_is_wrong():
    with pytest.raises(RecipeError, match=r"tokenizer\.yaml:\d+: train\.global_batch: 768 is not divisible by 7"):
        run("check", "recipes/tokenizer_sim_droid.yaml", "--world-size", "7")
    group = ("--set", "strategy.name=hsdp", "--set", "strategy.shard_group=16")
    with pytest.raises(RecipeError, match=r"strategy\.shard_group: 16 does not divide 8 processes"):
        run("check", "recipes/tokenizer_sim_droid.yaml", "--offline", "--world-size", "8", *group)


def test_explain_covers_every_field():
    for field in all_fields():
        assert field.doc, f"{field.key} has no documentation"
        assert field.doc.split()[0] in run("explain", ".".join(field.key))
    table = run("explain", "data.sources")
    assert re.search(r"NAME\.path +text or a list \(text each\) +required +Folder or URL", table)
    assert "data.sources.libero.weight" in run("explain", "data.sources.libero.weight")
    assert "optimizer" in run("explain")


@pytest.mark.parametrize(("wrong", "right"), [("data.source", "data.sources"), ("lr", "optimizer.lr")])
def test_explain_suggests(wrong, right):
    with pytest.raises(StamoError, match=f"{wrong}: no such field; did you mean {right}"):
        run("explain", wrong)


def test_committed_schema_is_current(tmp_path):
    run("schema", str(tmp_path / "new.json"))
    new = json.loads((tmp_path / "new.json").read_text())
    assert new == json_schema() == json.loads(run("schema"))
    assert new == json.loads(Path("recipes/schema.json").read_text()), "run `stamo recipe schema recipes/schema.json`"
    with pytest.raises(StamoError, match=r"no-such-folder/x.json: cannot be written"):
        run("schema", "no-such-folder/x.json")


def test_every_recipe_command_of_the_docs_page_runs(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/mix-data.md").read_text()
    for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        Path(text.splitlines()[0].removeprefix("# ")).write_text(text)
    commands = [
        shlex.split(line, comments=True)
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
        if line.startswith("stamo recipe ")
    ]
    assert len(commands) >= 8
    for command in commands:
        assert run(*command[2:])
    trimmed = load("recipes/my_trimmed_mix.yaml").recipe.data.sources
    assert "libero_90" not in trimmed
    assert trimmed["droid"].path == "data/shards/droid"
