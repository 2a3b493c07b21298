"""Slurm's commands as functions. They do not need accounting (sacct)."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from stamo_dist.errors import StamoError

_TIMEOUT = 30.0  # seconds
_CONFIGURATIONS = ("/etc/slurm/slurm.conf", "/run/slurm/conf/slurm.conf")
_PLACES = ("/usr/bin", "/usr/local/bin", "/opt/slurm/bin", "/usr/local/slurm/bin")
_FIELDS = {  # fields of `SlurmJob` → squeue's format
    "id": "%i", "state": "%T", "reason": "%r", "start": "%S", "nodes": "%N", "count": "%D", "elapsed": "%M",
    "limit": "%l", "partition": "%P", "user": "%u", "name": "%j",
}  # fmt: skip

#: States in which a job will run, runs, or will run again.
ACTIVE = frozenset({
    "PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING",
    "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD",
})  # fmt: skip


#: Variables of the shell that have Slurm's commands show or end only some of the jobs; and those of an allocation in
#: which it is: sbatch passes them on into the job, where its srun follows them. The others say which Slurm it is.
_ELSEWHERE = re.compile(r"SQUEUE_|SCONTROL_|SCANCEL_|SLURM_(?!(CONF|CONF_SERVER|CLUSTERS|JWT)$)")
_OF_THE_QUEUE = re.compile(r"#SBATCH --(dependency|kill-on-invalid-dep|array|hold)\b")  # not of the nodes

#: What Slurm's commands print when the controller cannot be reached, or does not take part at the moment.
_AWAY = re.compile(
    r"unable to contact|unable to connect|unable to establish|timed out|connection (refused|reset|timed)|no route to"
    r"|zero bytes|transport|communication|standby|credential|munge|temporarily unavailable|try again",
    re.IGNORECASE,
)


class SlurmError(StamoError):
    """A Slurm command failed; has its message."""


class SlurmAwayError(SlurmError):
    """Slurm did not answer: whether it did what it was asked is unknown, and it may be asked again."""


@dataclass(frozen=True)
class SlurmJob:
    """One job, or one task of an array, as squeue shows it."""

    id: str  # "12", or "12_3" in an array
    state: str  # PENDING, RUNNING, COMPLETED, …
    reason: str  # Slurm's reason for waiting or ending; "None" without one
    start: datetime | None  # actual or expected start time
    nodes: str  # n[1-3]
    count: int  # number of nodes
    elapsed: str
    limit: str
    partition: str
    user: str
    name: str

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


@functools.lru_cache
def available() -> bool:
    """Whether this machine can submit to a Slurm cluster."""
    if shutil.which("sbatch") is None:
        return False
    if "SLURM_CONF" in os.environ or any(Path(p).is_file() for p in _CONFIGURATIONS):
        return True
    try:  # configuration elsewhere, or from a server
        run("scontrol", "ping")
    except SlurmError:
        return False
    return True


def tool(name: str) -> str | None:
    """The path of a Slurm command: in PATH, beside another one in PATH, or in a usual folder.

    A profile's `environment` or `setup` may remove them from a job's PATH.
    """
    others = map(shutil.which, ("srun", "squeue", "sbatch", "scontrol"))
    beside = [str(Path(other).resolve().parent) for other in others if other]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join([*beside, *_PLACES]))


def run(*command: str, stdin: str | None = None, cwd: str | None = None) -> str:
    """Run a Slurm command and return its output.

    Raises:
        SlurmAwayError: The controller does not answer.
        SlurmError: It is missing, or fails.
    """
    found = tool(command[0])
    if found is None:
        place = "has this node none?" if "SLURM_JOB_ID" in os.environ else "is this a login node of a Slurm cluster?"
        raise SlurmError(f"{command[0]}: not found; {place}")
    try:
        done = _execute([found, *command[1:]], stdin, cwd)
    except OSError as e:
        raise SlurmError(f"{found}: {e.strerror}") from None
    except subprocess.TimeoutExpired:
        raise SlurmAwayError(f"{command[0]}: no answer within {_TIMEOUT:g} s; is the Slurm controller up?") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        kind = SlurmAwayError if _AWAY.search(said) else SlurmError
        raise kind(f"{' '.join(command[:2])}: {said}")
    return done.stdout


def _execute(command: Sequence[str], stdin: str | None, cwd: str | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # jobs of others may have names in any encoding
        command, input=stdin, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT, check=False,
        cwd=cwd, env=_environ(),
    )  # fmt: skip


def _environ() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not _ELSEWHERE.match(name)}
    return {**kept, "SQUEUE_ALL": "1", "SCONTROL_ALL": "1"}  # partitions may be hidden


def jobs(ids: Sequence[str] | None = None, *, user: str | None = None) -> list[SlurmJob]:
    """The jobs with these ids (all when omitted), with ended ones that Slurm still knows; skips unknown ids."""
    command = ["squeue", "--noheader", "--array", "--states=all", f"--format={'|'.join(_FIELDS.values())}"]
    if user is not None:
        command.append(f"--user={user}")
    lines = run(*command).splitlines()  # squeue with ids fails if one of them is no longer known
    found = [_job(line) for line in lines if line.count("|") >= len(_FIELDS) - 1]
    if ids is None:
        return found
    wanted = set(ids)
    return [job for job in found if job.id in wanted or job.id.partition("_")[0] in wanted]


def commented(text: str) -> str | None:
    """The id of the job, or of the whole array, that was submitted with this comment; None without one."""
    lines = run("squeue", "--noheader", "--states=all", "--format=%F|%k").splitlines()
    return next((line.partition("|")[0] for line in lines if line.partition("|")[2] == text), None)


def details(job: str) -> dict[str, str]:
    """The output of `scontrol show job`, by Slurm's names; empty if the job is no longer known."""
    try:
        return _pairs(run("scontrol", "--oneliner", "show", "job", job).partition("\n")[0])
    except SlurmError as e:
        if "Invalid job id" in str(e):
            return {}
        raise


def shrink(job: str, nodes: int) -> None:
    """Shrink a running job to this many nodes, including that of its batch script.

    Raises:
        SlurmError: Slurm refuses.
    """
    with tempfile.TemporaryDirectory() as folder:  # scontrol writes a script into the working directory
        run("scontrol", "update", f"JobId={job}", f"NumNodes={nodes}", cwd=folder)


def exclude(job: str, nodes: Sequence[str]) -> None:
    """Have a waiting job stay off these nodes, and off no others.

    Raises:
        SlurmError: Slurm refuses.
    """
    run("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")


def refuses(job: str, without: Sequence[str]) -> str:
    """Why Slurm would not take the job's script again without these nodes; "" if it would.

    Raises:
        SlurmError: It cannot be asked.
    """
    script = run("scontrol", "write", "batch_script", job.partition("_")[0], "-")
    lines = (line for line in script.splitlines(keepends=True) if not _OF_THE_QUEUE.match(line))
    try:
        run("sbatch", "--test-only", f"--exclude={','.join(without)}", stdin="".join(lines))
    except SlurmAwayError:
        raise
    except SlurmError as e:
        return str(e).partition(": ")[2]
    return ""


def partitions() -> dict[str, dict[str, str]]:
    """Name → output of `scontrol show partition`."""
    lines = run("scontrol", "--oneliner", "show", "partition").splitlines()
    found = [_pairs(line) for line in lines if line.startswith("PartitionName=")]
    return {p["PartitionName"]: p for p in found}


def config() -> dict[str, str]:
    """Slurm's configuration by `scontrol show config`."""
    lines = run("scontrol", "show", "config").splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


@dataclass(frozen=True)
class Association:
    """An account that a user may charge, in one partition or (\"\") in all, with these QOS."""

    account: str
    partition: str
    qos: frozenset[str]


def associations(user: str) -> list[Association] | None:
    """The user's associations if the cluster enforces them (AccountingStorageEnforce); None if not, or if unknown."""
    try:
        if not re.search(r"associations|limits|qos|safe|wckeys|all", config().get("AccountingStorageEnforce", "")):
            return None
        wish = ("show", "assoc", "where", f"user={user}", "format=account,partition,qos", "--noheader", "--parsable2")
        lines = run("sacctmgr", *wish).splitlines()
    except SlurmError:
        return None
    rows = [line.split("|") for line in lines if line.count("|") == 2]
    return [Association(account, partition, frozenset(qos.split(","))) for account, partition, qos in rows]


def default_account(user: str) -> str | None:
    """The account that is charged if a job names none; None if unknown, as without accounting."""
    if given := os.environ.get("SBATCH_ACCOUNT"):
        return given
    wish = ("show", "user", "where", f"name={user}", "format=defaultaccount", "--noheader", "--parsable2")
    try:
        return run("sacctmgr", *wish).strip() or None
    except SlurmError:
        return None


def expand(nodes: str) -> list[str]:
    """Slurm's short form → the nodes' names: `n[08-10],x` → n08, n09, n10, x."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        pieces = [_range(p[1:-1]) if p.startswith("[") else [p] for p in re.findall(r"\[[^\]]*\]|[^\[]+", part)]
        names += ["".join(choice) for choice in itertools.product(*pieces)]
    return names


def _range(text: str) -> list[str]:
    out: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        out += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return out


Fate = Literal["queued", "cancelled", "ending", ""]


def fate(job: str, restart: int) -> Fate:
    """What Slurm will do with a job whose processes have ended in its start number `restart`, counted from 0.

    "queued": it starts it again. "cancelled": a user ended it. "ending": it ends it, because of its time limit, a
    preemption or a user, which cannot be told apart. "": nothing, or it does not know the job.

    Raises:
        SlurmError: Slurm does not answer.
    """
    found = details(job)
    state = found.get("JobState", "")
    if int(found.get("Restarts", restart)) > restart or state in ("PENDING", "REQUEUED"):
        return "queued"
    if state == "CANCELLED":
        return "cancelled"
    if state != "COMPLETING":
        return ""
    # Only some completing jobs show their reason; TimeLimit is also that of one whose reservation has ended. A job
    # preempted with PreemptMode=CANCEL was not cancelled by a user.
    ran, limit = _passed(found.get("RunTime", "")), _passed(found.get("TimeLimit", ""))
    late = found.get("Reason") == "TimeLimit" or (ran is not None and limit is not None and ran >= limit)
    return "ending" if late or found.get("PreemptTime", "None") != "None" else "cancelled"


def requeue(job: str) -> None:
    run("scontrol", "requeue", job)


def cancel(*ids: str, signal: str | None = None) -> None:
    """End the jobs, or send their steps a signal."""
    run("scancel", *([f"--signal={signal}"] if signal else []), *ids)


def _job(line: str) -> SlurmJob:
    found: dict[str, Any] = dict(zip(_FIELDS, line.split("|", len(_FIELDS) - 1), strict=True))
    return SlurmJob(**{**found, "start": _time(found["start"]), "count": int(found["count"] or 0)})


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:  # N/A, Unknown
        return None


def _passed(text: str) -> float | None:
    """[D-]HH:MM:SS in seconds; None if it is none, as without a limit or after a jump of the clock."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(n or 0) for n in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _pairs(line: str) -> dict[str, str]:
    """The pairs of a line, each name's first: words of a command or comment come later and may look like pairs."""
    found: dict[str, str] = {}
    for name, value in re.findall(r"([A-Za-z][\w/:]*)=(.*?)(?=\s+[A-Za-z][\w/:]*=|\s*$)", line):
        found.setdefault(name, value)
    return found
