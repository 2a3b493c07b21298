"""A real Slurm cluster on this machine: a controller and nodes, each in network, host name and process namespaces of
its own with its own address. Killing a node's first process is a power failure. Needs root and Debian's slurm-wlm."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_CLIENTS = ("sbatch", "squeue", "scancel", "scontrol", "srun", "sinfo", "sacctmgr")
_FREEZER = Path("/sys/fs/cgroup/freezer")
_INIT = """\
hostname {name}; ip link set lo up
mount --bind {root}/etc/hosts /etc/hosts; mount --bind {root}/etc/nsswitch.conf /etc/nsswitch.conf
trap 'exit 0' TERM; echo ready >{root}/run/{name}.ready
while :; do sleep 3600 & wait $!; done
"""
_CONF = """\
ClusterName={name}
SlurmctldHost=ctl({subnet}.1)
SlurmctldPort=17817
AuthType=auth/munge
# A job that is queued again waits cred_expire + 1 s; 5 is the least that Slurm takes.
AuthInfo=socket={root}/munge/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
{accounting}
SwitchType=switch/none
PropagateResourceLimits=NONE
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1,bf_resolution=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
MessageTimeout=5
TCPTimeout=2
KillWait={kill_wait}
DefMemPerCPU=100
MinJobAge=86400
GresTypes=gpu
{nodes}
PartitionName=low   Nodes=ALL Default=YES MaxTime=2-0 DefaultTime=60 State=UP PriorityTier=1  GraceTime={grace}
PartitionName=now   Nodes=ALL MaxTime=2-0 DefaultTime=60 State=UP PriorityTier=1  GraceTime=0
PartitionName=high  Nodes=ALL MaxTime=2-0 DefaultTime=60 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=small Nodes={first} MaxTime=30 DefaultTime=5 State=UP PriorityTier=1
PartitionName=staff Nodes=ALL MaxTime=30 DefaultTime=5 State=UP PriorityTier=1 AllowAccounts=staff,admins
"""


def missing() -> str | None:
    """Why no cluster can be started here, with what to do; None where one can."""
    if not shutil.which("slurmctld") or not shutil.which("munged") or not shutil.which("slurmd"):
        return "Slurm is not installed (Debian: apt-get install --no-install-recommends slurm-wlm munge)"
    if os.geteuid() != 0:
        return "a test cluster needs root, for network namespaces"
    probe = subprocess.run(
        ["unshare", "-n", "-u", "-m", "-p", "-f", "true"], check=False, capture_output=True, text=True
    )
    return f"namespaces are not allowed here ({probe.stderr.strip()})" if probe.returncode else None


@dataclass
class Cluster:
    """Started by `start`, ended by `stop`; the clients are in `bin`."""

    root: Path
    # Slurm names groups of processes on this machine after them, so no two clusters may share one.
    names: Sequence[str] = tuple(f"t{os.getpid()}n{i}" for i in (1, 2, 3))
    cpus: int = 4
    subnet: str = "10.83.0"
    grace: int = 20
    kill_wait: int = 10
    _inits: dict[str, int] = field(default_factory=dict)

    @property
    def bin(self) -> Path:
        return self.root / "bin"

    @property
    def env(self) -> dict[str, str]:
        """For a process that is to see this cluster."""
        return {
            **os.environ,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "SLURM_CONF": str(self.root / "etc/slurm.conf"),
        }

    def start(self) -> None:
        self._write()
        self._namespace("ctl")
        self._inside("ctl", "sh", "-c", (
            f"ip link add br0 type bridge forward_delay 0; ip addr add {self.subnet}.1/24 dev br0; ip link set br0 up"
        ))  # fmt: skip
        munge = self.root / "munge"
        self._inside(
            "ctl", "munged", f"--key-file={munge}/munge.key", f"--socket={munge}/munge.socket", "--force",
            f"--pid-file={self.root}/run/munged.pid", f"--seed-file={munge}/seed", f"--log-file={self.root}/log/munged",
        )  # fmt: skip
        self._keep_accounts()
        self.start_controller()
        for name in self.names:
            self.start_node(name)
        self.until(
            lambda: self.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D").strip() == str(len(self.names))
        )

    @property
    def _accounting(self) -> str:
        """Of slurm.conf."""
        return "AccountingStorageType=accounting_storage/none"

    def _keep_accounts(self) -> None:
        """Start what the controller needs for it."""

    def start_node(self, name: str) -> None:
        """Power one node on."""
        (self.root / "spool" / name).mkdir(parents=True, exist_ok=True)
        if name not in self._inits:
            self._namespace(name)
            link = f"v{name}"
            self._inside("ctl", "sh", "-c", (
                f"ip link del {link} 2>/dev/null; ip link add {link} type veth peer name eth0 "
                f"netns {self._inits[name]} && ip link set {link} master br0 up"
            ), spaces="n")  # fmt: skip
            self._inside(name, "sh", "-c", (
                f"ip addr add {self._address(name)}/24 dev eth0 && ip link set eth0 up && "
                f"ip route add default via {self.subnet}.1"
            ))  # fmt: skip
        self._inside(name, "slurmd", "-f", str(self.root / "etc/slurm.conf"), "-N", name)

    def kill_node(self, name: str) -> None:
        """Cut its power: everything that runs there is gone at once."""
        os.kill(self._inits.pop(name), 9)

    @contextlib.contextmanager
    def unlinked(self, name: str) -> Iterator[None]:
        """While its network cable is out, processes there run on."""
        self._inside("ctl", "ip", "link", "set", f"v{name}", "down", spaces="n")
        try:
            yield
        finally:
            self._inside("ctl", "ip", "link", "set", f"v{name}", "up", spaces="n")

    def start_controller(self) -> None:
        self._inside("ctl", "slurmctld", "-f", str(self.root / "etc/slurm.conf"))

    @contextlib.contextmanager
    def no_controller(self) -> Iterator[None]:
        """While it is stopped, jobs run on."""
        pid = self.root / "run" / "slurmctld.pid"
        self._inside("ctl", "sh", "-c", f"p=$(cat {pid}); kill $p; while kill -0 $p 2>/dev/null; do sleep 0.05; done")
        try:
            yield
        finally:
            self.start_controller()

    @contextlib.contextmanager
    def configured(self, **settings: object) -> Iterator[None]:
        """With these settings of slurm.conf."""
        file = self.root / "etc" / "slurm.conf"
        before = changed = file.read_text()
        for name, value in settings.items():
            changed = re.sub(rf"(?m)^{name}=.*$", f"{name}={value}", changed)
        assert changed != before
        file.write_text(changed)
        self.run("scontrol", "reconfigure")
        try:
            yield
        finally:
            file.write_text(before)
            self.run("scontrol", "reconfigure")

    @staticmethod
    def programs(name: str) -> list[Path]:
        """Where one of Slurm's commands is."""
        return [path for folder in ("/usr/bin", "/usr/local/bin") if (path := Path(folder, name)).exists()]

    @contextlib.contextmanager
    def without(self, node: str, *programs: Path) -> Iterator[None]:
        """As if the node did not have these."""
        for program in programs:
            self._inside(node, "mount", "--bind", "/dev/null", str(program))
        try:
            yield
        finally:
            for program in programs:
                self._inside(node, "umount", str(program))

    def stop(self) -> None:
        for name in list(self._inits):
            with contextlib.suppress(ProcessLookupError):
                self.kill_node(name)
        for name in self.names:
            for _ in range(10):
                groups = sorted(_FREEZER.glob(f"slurm_{name}/**/"), reverse=True)
                for group in groups:
                    with contextlib.suppress(OSError):
                        group.rmdir()
                if not groups:
                    break
                time.sleep(0.1)

    def run(self, *command: str, check: bool = True, path: Path | None = None) -> str:
        """What a client prints; a job has the programs in `path` too."""
        env = self.env if path is None else {**self.env, "PATH": f"{path}:{self.env['PATH']}"}
        done = subprocess.run(command, env=env, check=False, capture_output=True, text=True, timeout=120)
        assert not (check and done.returncode), f"{command}: {done.stderr}"
        return done.stdout

    def until(
        self, condition: Callable[[], object], seconds: float = 240, what: Callable[[], str] = lambda: ""
    ) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"nothing within {seconds} s\n{what()}\n{self.run('squeue', '--states=all')}")
            time.sleep(0.1)

    def state(self, job: str) -> str:
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def _address(self, name: str) -> str:
        return f"{self.subnet}.{11 + self.names.index(name)}"

    def _namespace(self, name: str) -> None:
        ready = self.root / "run" / f"{name}.ready"
        ready.unlink(missing_ok=True)
        outer = subprocess.Popen(
            ["setsid", "unshare", "-n", "-u", "-m", "-p", "-f", "--kill-child", "--mount-proc", "bash", "-c",
             _INIT.format(name=name, root=self.root)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.until_file(ready)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        self._inits[name] = int(children[0])
        (self.root / "run" / f"{name}.pid").write_text(children[0])

    def until_file(self, path: Path, seconds: float = 10) -> None:
        deadline = time.monotonic() + seconds
        while not path.exists():
            assert time.monotonic() < deadline, f"no {path}"
            time.sleep(0.02)

    def _inside(self, name: str, *command: str, spaces: str = "nump") -> None:
        enter = ["nsenter", "-t", str(self._inits[name]), *(f"-{space}" for space in spaces), "--"]
        done = subprocess.run(
            [*enter, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=120, check=False, env={**os.environ, "SLURM_CONF": str(self.root / "etc/slurm.conf")},
        )  # fmt: skip
        assert not done.returncode, f"{name}: {command}: {done.stdout}"

    def _write(self) -> None:
        for part in ("etc", "log", "run", "state", "spool", "bin", "dev", "munge"):
            (self.root / part).mkdir(parents=True, exist_ok=True)
        key = self.root / "munge" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        etc = self.root / "etc"
        hosts = ["127.0.0.1 localhost", f"{self.subnet}.1 ctl", *(f"{self._address(n)} {n}" for n in self.names)]
        (etc / "hosts").write_text("\n".join(hosts) + "\n")
        nss = Path("/etc/nsswitch.conf").read_text()
        (etc / "nsswitch.conf").write_text(re.sub(r"(?m)^hosts:.*\n?", "", nss) + "\nhosts: files\n")
        nodes = "\n".join(
            f"NodeName={n} NodeHostname={n} NodeAddr={self._address(n)} Port=17818 CPUs={self.cpus} RealMemory=16000 "
            "State=UNKNOWN"
            for n in self.names
        )
        (etc / "slurm.conf").write_text(_CONF.format(
            name=f"test{os.getpid()}", root=self.root, subnet=self.subnet, nodes=nodes, first=self.names[0],
            grace=self.grace, kill_wait=self.kill_wait, accounting=self._accounting,
            proctrack="cgroup" if os.access(_FREEZER / "cgroup.procs", os.W_OK) else "pgid",
        ))  # fmt: skip
        (etc / "gres.conf").write_text("AutoDetect=off\n")
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainRAMSpace=no\n")
        hosts_of_cluster = "|".join(["ctl", *self.names])
        for client in _CLIENTS:
            path = shutil.which(client)
            script = self.bin / client
            script.write_text(
                f"#!/bin/sh\nexport SLURM_CONF={etc}/slurm.conf\n"
                f'case "$(uname -n)" in {hosts_of_cluster}) exec {path} "$@";; esac\n'
                f'exec nsenter -t $(cat {self.root}/run/ctl.pid) -n -u -- {path} "$@"\n'
            )
            script.chmod(0o755)
