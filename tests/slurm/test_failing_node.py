"""A node on which starts fail, on a real cluster: the third start stays off it. Who was to be told is not there."""

from __future__ import annotations

import json

from test_interrupted import SLOW

from stamo_dist.launch import slurm
from stamo_dist.launch.record import main_log

SECRET = "T0/B1/7hrs8fk2"
#: The third step fails on one node, whatever rank it has.
BROKEN = (
    "tasks/tokenizer.py",
    "\n\nimport os as _os\n\n_good, _calls = TokenizerTask.loss, []\n\n\n"
    "def _bad(self, *inputs):\n    _calls.append(1)\n"
    "    if _os.environ['SLURMD_NODENAME'] == '{}' and len(_calls) > 2:\n"
    "        raise RuntimeError('CUDA error: the device is lost')\n    return _good(self, *inputs)\n\n\n"
    "TokenizerTask.loss = _bad\n",
)


def test_the_third_start_stays_off_it(submit, cluster, stamo_there, monkeypatch):
    first, broken, third = cluster.names
    monkeypatch.setenv("MY_HOOK", f"http://{cluster.subnet}.1:9/{SECRET}")  # nobody listens there
    notify = {"webhook": "$MY_HOOK", "mail": "me@example.org", "on": ["failure", "end"]}
    run = submit("run", {"nodes": 2, "notify": notify}, "train.steps=8", "train.checkpoint.every=1000")
    told = slurm._pairs(cluster.run("scontrol", "--oneliner", "show", "job", run.job).strip())
    assert (told["MailUser"], told["MailType"]) == ("me@example.org", "END,FAIL")

    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.env[name])
    assert slurm.refuses(run.job, [broken]) == ""
    assert "not available" in slurm.refuses(run.job, [broken, third]), "one node of three is too few"
    cluster.run("scontrol", "update", f"NodeName={third}", "State=DRAIN", "Reason=test")
    assert "down, drained" in slurm.refuses(run.job, [broken])
    cluster.run("scontrol", "update", f"NodeName={third}", "State=RESUME")
    for nodes, shown in (([broken, first], f"{broken},{first}"), ([], "(null)")):
        slurm.exclude(run.job, nodes)
        found = slurm.details(run.job)["ExcNodeList"]
        assert sorted(slurm.expand(found)) == sorted(shown.split(",")), found

    run.release(SLOW, (BROKEN[0], BROKEN[1].format(broken)))
    run.ends("finished")
    assert run.story == ["submitted", *["started", "failed", "requeued"] * 2, "started", "finished"]
    starts = [e.nodes for e in run.events if e.event == "started"]
    assert starts == [[first, broken], [first, broken], [first, third]]
    failed = [(e.blamed, e.cause) for e in run.events if e.event == "failed"]
    assert failed == [([broken], "RuntimeError: CUDA error: the device is lost")] * 2
    assert [e.avoids for e in run.events if e.event == "requeued"] == [[], [broken]]
    log = main_log(run.folder).read_text()
    assert f"stays off {broken} (2 starts failed there)" in log
    assert "notify: $MY_HOOK: Connection refused, so nobody was told" in log
    assert f"stays off   {broken}: RuntimeError: CUDA error: the device is lost" in stamo_there("status", run.folder)
    assert not any(SECRET.encode() in path.read_bytes() for path in run.folder.rglob("*") if path.is_file())
    assert json.loads(stamo_there("status", run.folder, "--json"))[0]["state"] == "finished"
