"""Who may submit: a cluster with slurmdbd that insists on accounts and limits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accounting import AccountedCluster, missing_database
from cluster import missing
from toy import write_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def accounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AccountedCluster]:
    """The user has the accounts root and old; old may submit no more, and staff is somebody else's."""
    if why := missing() or missing_database():
        pytest.skip(f"no cluster with accounts: {why}")
    made = AccountedCluster(tmp_path_factory.mktemp("accounted"))
    try:
        made.start()
        for account in ("old", "staff"):
            made.accounts("add", "account", account)
        made.accounts("add", "user", "root", "account=old")
        made.accounts("modify", "user", "where", "name=root", "account=old", "set", "maxsubmitjobs=0")
        yield made
    finally:
        made.stop()


@pytest.fixture
def submit(
    accounted: AccountedCluster, toy: SimpleNamespace, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`submit(verb, field=value…)`: the toy recipe, with these fields of its profile."""
    recipe = write_recipe(tmp_path / "toy.yaml", toy.shards, toy.vae)

    def run(*words: object, **fields: object) -> subprocess.CompletedProcess[str]:
        profile = tmp_path / "profile.yaml"
        profile.write_text(yaml.safe_dump({"time": "00:10:00", "sbatch": {"hold": True}, **fields}))
        command = [*words] if words else ["submit", recipe, "--cluster", profile]
        return subprocess.run(
            [sys.executable, "-m", "stamo_dist.cli", *map(str, command)], check=False, capture_output=True, text=True,
            cwd=ROOT, timeout=180, env={**accounted.env, "XDG_STATE_HOME": str(tmp_path / "state")},
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"account": "stafff"},
            "account: stafff is none of yours for partition low, or has expired; yours are old, root",
        ),
        ({"account": "staff"}, "account: staff is none of yours for partition low, or has expired"),
        ({"account": "root", "partition": "staff"}, "account: partition staff does not take root; it takes only staff"),
        (
            {"partition": "staff"},
            "account: partition staff does not take root, your default account; it takes only staff",
        ),
        ({"account": "root", "qos": "nomal"}, "qos: you may not use nomal with account root; did you mean normal?"),
        ({"account": "old"}, "Job violates accounting/QOS policy"),
        ({"account": "old"}, "the account old or your default qos allows less, or no more: `sacctmgr show assoc"),
    ],
)
def test_refused(accounted, submit, tmp_path, fields, words):
    """What sacctmgr tells is said before sbatch is asked; the rest in sbatch's own words, with a hint."""
    done = submit(**fields)
    assert done.returncode == 2, done.stdout
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not accounted.run("squeue", "-h", "-t", "all", "-o", "%i").strip()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["profile.yaml", "toy.yaml"]


def test_status_where_accounting_is_on(accounted, submit, tmp_path):
    done = submit(account="root")
    assert done.returncode == 0, done.stderr
    [run] = json.loads(submit("status", tmp_path / "run", "--json").stdout)
    assert (run["state"], "held" in run["detail"]) == ("queued", True)
    accounted.run("scontrol", "update", f"JobId={run['job']}", "Partition=staff")
    accounted.run("scontrol", "release", run["job"])
    accounted.until(lambda: "account not permitted" in accounted.run("squeue", "-h", "-o", "%r"), 30)
    [run] = json.loads(submit("status", tmp_path / "run", "--json").stdout)
    assert run["detail"].startswith("it never starts so: the partition does not take the account")
    assert submit("cancel", tmp_path / "run").returncode == 0
    [run] = json.loads(submit("status", tmp_path / "run", "--json").stdout)
    assert run["state"] == "cancelled"
