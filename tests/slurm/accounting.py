"""A cluster that keeps accounts: slurmdbd on a MariaDB of its own, and nobody may submit without an association."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from cluster import Cluster

_DATABASE = """\
[mariadbd]
user=root
datadir={root}/db
socket={root}/run/mariadb.sock
pid-file={root}/run/mariadb.pid
bind-address=127.0.0.1
port=17853
skip-grant-tables
skip-name-resolve
skip-log-bin
performance-schema=OFF
innodb_buffer_pool_size=64M
innodb_log_file_size=8M
innodb_lock_wait_timeout=900
innodb_flush_log_at_trx_commit=0
innodb_doublewrite=0
"""
_DBD = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge/munge.socket
DbdHost=ctl
DbdAddr={subnet}.1
DbdPort=17819
SlurmUser=root
LogFile={root}/log/slurmdbd.log
PidFile={root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=17853
StorageUser=root
StorageLoc=slurm_acct_db
"""


def missing_database() -> str | None:
    """Why no accounts can be kept here, with what to do; None where they can."""
    if not shutil.which("slurmdbd") or not shutil.which("mariadbd"):
        return "no slurmdbd (Debian: apt-get install --no-install-recommends slurmdbd mariadb-server)"
    return None


@dataclass
class AccountedCluster(Cluster):
    """One node, accounts and limits. The user of the tests has what `accounts` gave, and the account root."""

    names: Sequence[str] = (f"t{os.getpid()}a1",)
    subnet: str = "10.84.0"

    @property
    def _accounting(self) -> str:
        return (
            "AccountingStorageType=accounting_storage/slurmdbd\n"
            f"AccountingStorageHost={self.subnet}.1\nAccountingStoragePort=17819\n"
            f"AccountingStoragePass={self.root}/munge/munge.socket\nAccountingStorageEnforce=associations,limits"
        )

    def accounts(self, *words: str) -> None:
        """`sacctmgr` without a question; that nothing changes is no error."""
        self.run("sacctmgr", "--immediate", *words)

    def _keep_accounts(self) -> None:
        (self.root / "db").mkdir()
        config, dbd = self.root / "etc" / "my.cnf", self.root / "etc" / "slurmdbd.conf"
        config.write_text(_DATABASE.format(root=self.root))
        dbd.touch(mode=0o600)
        dbd.write_text(_DBD.format(root=self.root, subnet=self.subnet))
        subprocess.run(  # slurmdbd needs stored procedures, and they the system's tables
            ["mariadb-install-db", "--no-defaults", f"--datadir={self.root}/db", "--user=root", "--skip-test-db",
             "--auth-root-authentication-method=normal", "--innodb-log-file-size=8M"],
            check=True, capture_output=True, timeout=180,
        )  # fmt: skip
        enter = ["nsenter", "-t", str(self._inits["ctl"]), "-n", "-u", "-m", "-p", "--"]
        with (self.root / "log" / "mariadb").open("wb") as log:
            subprocess.Popen([*enter, "mariadbd", f"--defaults-file={config}"], stdout=log, stderr=log)
        self.until_file(self.root / "run" / "mariadb.sock", 120)
        self._inside("ctl", "slurmdbd")
        self.until(self._known)

    def _known(self) -> bool:
        name = f"test{os.getpid()}"
        self.run("sacctmgr", "--immediate", "add", "cluster", name, check=False)
        return name in self.run("sacctmgr", "--noheader", "show", "cluster", "format=cluster%40", check=False)
