"""DeepSpeed as the strategies use it."""

from __future__ import annotations

from importlib import import_module

import pytest

from stamo_dist.distributed.strategies import _compile_nothing


def test_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = import_module("deepspeed.comm.torch")
    monkeypatch.setattr(backend, "build_shm_op", backend.build_shm_op)  # which is there, and put back
    _compile_nothing()
    assert backend.build_shm_op() is None
