"""A training on several nodes leaves its export to one of them."""

from __future__ import annotations

from collections.abc import Callable

from cluster import Cluster
from conftest import Run

from stamo_dist.launch.record import main_log
from stamo_dist.run.folder import RunFolder

_HELD = """

_finish = finish
def finish(given):
    import pathlib, time
    while not (pathlib.Path(given) / "go").exists():
        time.sleep(0.1)
    _finish(given)
"""


def test_the_other_nodes_are_free_while_it_exports_and_only_the_export_is_done_again(
    cluster: Cluster, submit: Callable[..., Run]
) -> None:
    run = submit("run", {"partition": "low", "nodes": 2, "processes_per_node": 1}, "train.steps=4")
    run.release(("publish/publish.py", _HELD))
    run.until(lambda: run.story == ["submitted", "started", "exporting"], 120)
    run.until(lambda: cluster.run("squeue", "-h", "-j", run.job, "-o", "%D %T").strip() == "1 RUNNING")
    assert not RunFolder(run.folder).model.exists()
    log = main_log(run.folder).read_text()
    assert "the model is exported by a process of its own, on one node" in log

    cluster.run("scontrol", "requeue", run.job)
    run.until(lambda: run.story.count("exporting") == 2, 120)
    (run.folder / "go").touch()
    run.ends("finished")
    once = ["started", "exporting"]
    assert run.story == ["submitted", *once, "preempted", "requeued", *once, "finished"]
    assert [e.world_size for e in run.events if e.event == "started"] == [2, 1]
    assert main_log(run.folder).read_text().count("step 4/4") == log.count("step 4/4"), "it was not trained again"
    assert RunFolder(run.folder).exported_step == 4
    assert list(RunFolder(run.folder).model.iterdir())
