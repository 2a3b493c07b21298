"""Telling files that this user's runs wrote from files that came with a folder from elsewhere.

A file is sealed with a key that only this user can read, which lies outside of every run folder.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from contextlib import suppress
from pathlib import Path

_SIZE = hashlib.sha256().digest_size


def seal(content: bytes) -> bytes:
    """The content behind a digest of it.

    Raises:
        OSError: The key cannot be read or written.
    """
    return hmac.digest(_key(), content, "sha256") + content


def unseal(sealed: bytes) -> bytes | None:
    """The content that `seal` was given; None if another user, or no run, sealed it.

    Raises:
        OSError: As `seal`.
    """
    digest, content = sealed[:_SIZE], sealed[_SIZE:]
    return content if hmac.compare_digest(digest, hmac.digest(_key(), content, "sha256")) else None


def _key() -> bytes:
    """This user's key, made when first needed."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "stamo" / "key"
    with suppress(FileNotFoundError):
        return _read(path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    whole = path.with_name(f".key.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        whole.touch(mode=0o600)
        whole.write_bytes(secrets.token_bytes(_SIZE))
        with suppress(FileExistsError):
            os.link(whole, path)  # of several processes that make one, the first
    finally:
        whole.unlink(missing_ok=True)
    return _read(path)


def _read(path: Path) -> bytes:
    key = path.read_bytes()
    if len(key) != _SIZE:
        raise OSError(0, f"{path} is damaged; delete it", str(path))
    return key
