"""The port of the rendezvous: from the moment it is chosen nobody else is given it."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from stamo_dist.distributed.rank import ReservedPort
from stamo_dist.launch.rank import environment


def test_a_reserved_port_is_the_stores_alone():
    with ReservedPort() as port:
        for family, address in ((socket.AF_INET, ""), (socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::")):
            with socket.socket(family) as other, pytest.raises(OSError, match="Address already in use"):
                other.bind((address, port.number))
        with ReservedPort() as second:
            assert second.number != port.number
        patience = timedelta(seconds=10)
        store = dist.TCPStore("127.0.0.1", port.number, 2, is_master=True, timeout=patience, wait_for_workers=False)
        store.set("a", "b")
        other = dist.TCPStore("127.0.0.1", port.number, 2, is_master=False, timeout=patience, wait_for_workers=False)
        assert other.get("a") == b"b"
        del other, store
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("", port.number))


def test_jobs_of_two_clusters_have_other_ports():
    """Without `stamo submit`, where nobody reserves one: same job id, same node."""
    job = {
        "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7",
        "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    }  # fmt: skip
    ports = [int(environment({**job, "SLURM_CLUSTER_NAME": name})["MASTER_PORT"]) for name in ("east", "east", "west")]
    assert ports[0] == ports[1] != ports[2]
    assert all(10000 <= port < 30000 for port in ports)
