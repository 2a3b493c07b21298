"""Shards in a data set of the Hub: a recipe names it, and trains on it as on the folder; the Hub is a server here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hub import Repository, serving
from toy import write_recipe

ROOT = Path(__file__).parents[2]


def test_a_recipe_trains_on_a_data_set_of_the_hub(toy: SimpleNamespace, tmp_path: Path) -> None:
    def stamo(*command: object, environ: dict[str, str]) -> tuple[int, str]:
        env = {**environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": os.environ["XDG_STATE_HOME"]}
        words = [sys.executable, "-m", "stamo_dist.cli", *map(str, command)]
        done = subprocess.run(words, check=False, capture_output=True, text=True, env=env, timeout=300)
        return done.returncode, done.stdout + done.stderr

    def trained(name: str, environ: dict[str, str], *settings: str) -> list[dict[str, Any]]:
        recipe = write_recipe(tmp_path / name / "toy.yaml", toy.shards, toy.vae, workers=1)
        chosen = [w for s in ("train.steps=3", f"data.cache={tmp_path / name}/cache", *settings) for w in ("--set", s)]
        code, said = stamo("train", recipe, *chosen, environ=environ)
        assert code == 0, said
        lines = (tmp_path / name / "run/metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k in ("step", "loss", "samples")} for line in lines]

    with serving() as hub:
        environ = hub.environ(tmp_path / "home", None)
        files = {p.relative_to(toy.shards).as_posix(): p.read_bytes() for p in toy.shards.rglob("*") if p.is_file()}
        hub.datasets["lab/arm"] = Repository({f"v1/{name}": content for name, content in files.items()}, commits=7)
        sources = [f"data.sources.{name}.path=hf://datasets/lab/arm@main/v1/{name}" for name in "ab"]
        assert trained("hub", environ, *sources) == trained("here", environ)
        assert any(path.endswith(".mds") for path in hub.asked)
        assert all(f"/datasets/lab/arm/resolve/{7:040x}/v1/" in path for path in hub.asked), "one commit for all"
        left = {path.name for path in (tmp_path / "hub/cache").rglob("*") if path.is_file()}
        assert not [name for name in left if name.endswith((".metadata", ".incomplete"))], "only the source's files"

        recipe = tmp_path / "here" / "toy.yaml"
        for path, why, given in (
            ("hf://datasets/lab/leg", "data set lab/leg not found on the Hub; check its name, or", environ),
            (
                "hf://datasets/lab/arm/v2",
                "manifest.json: cannot be read: not found in the Hub's",
                environ,
            ),
            ("hf://datasets/lab/arm/v1/a", "as HF_HUB_OFFLINE is set", {**environ, "HF_HUB_OFFLINE": "1"}),
            ("hf://lab/arm", "hf://lab/arm: write hf://datasets/OWNER/NAME, with @REVISION and /PATH", environ),
        ):
            command = ("train", recipe, "--set", f"data.sources.a.path={path}", "--set", f"run_dir={tmp_path}/none")
            code, said = stamo(*command, environ=given)
            assert code == 2, said
            assert why in said, said
            assert "Traceback" not in said
