"""`train.profile`: a trace of the steps that were asked for, which the report links."""

from __future__ import annotations

import gzip
import json

from toy import write_recipe


def test_the_steps_that_were_asked_for_are_traced(toy, stamo, tmp_path) -> None:
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)
    settings = ["train.steps=6", "train.profile={start: 2, steps: 3, memory: true}", "train.sync_guard=warn"]
    said = stamo("train", recipe, *(word for s in settings for word in ("--set", s))).stdout
    trace = tmp_path / "run/profile/step_00000003.json.gz"
    assert f"traced 3 steps: {trace}" in said
    assert "train.sync_guard: warn is of a GPU, and has no effect on a CPU" in said
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert names.count("Optimizer.step#AdamW.step") == 3
    assert "aten::scaled_dot_product_attention" in names
    assert sum(name == "[memory]" for name in names)
    assert [p.name for p in trace.parent.iterdir()] == [trace.name], "a CPU has no snapshot of its memory"
    stamo("report", tmp_path / "run")
    assert 'href="profile/step_00000003.json.gz"' in (tmp_path / "run/report.html").read_text()
    assert "peak_gb" not in (tmp_path / "run/metrics.jsonl").read_text()
