"""Conversion into a bucket: first completed in a local folder, then uploaded with the manifest last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_tools.convert.folder import ConversionOutcome, check_same, identity, run_plan
from data_tools.convert.plan import ConversionPlan, Settings, make_plan
from data_tools.convert.slices import held
from stamo_dist.data.schema import MANIFEST, Manifest, read_manifest
from stamo_dist.errors import DataError

#: Record of uploaded files, kept beside the local copy; for stores that cannot list their content.
LEDGER = ".uploaded.json"


def run_and_publish(format: str, src: Path, url: str, settings: Settings) -> ConversionOutcome:
    """Convert this run's share; the run that finds all shares done uploads the source and removes the local copy.

    An interrupted upload that is run again skips files that were uploaded.

    Raises:
        DataError: As `driver.run`, or the URL cannot be written.
    """
    url = url.rstrip("/")
    name = settings.name or url.rsplit("/", 1)[-1]
    plan = make_plan(format, src, name, settings)
    if (found := _published_as(plan, url, settings)) is not None:
        return ConversionOutcome(found, False)
    folder = settings.work or work_folder(url)
    # The work folder holds only this conversion's files.
    outcome = run_plan(plan, folder / name, replace(settings, overwrite=True))
    if outcome.manifest is None:
        return outcome
    lock = folder / f".{name}.upload.lock"
    with held(lock, -1):
        # Another run of the same conversion may have uploaded it meanwhile.
        if (found := _published_as(plan, url, settings)) is None:
            upload(folder / name, url, overwrite=settings.overwrite, quiet=settings.quiet)
        shutil.rmtree(folder / name, ignore_errors=True)
        lock.unlink(missing_ok=True)
    return ConversionOutcome(outcome.manifest, True)


def work_folder(url: str) -> Path:
    """Default folder of the local copy for a URL; the same on every run."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "stamo" / "convert" / hashlib.sha256(url.encode()).hexdigest()[:16]


def upload(source: Path, url: str, *, overwrite: bool = False, quiet: bool = False) -> None:
    """Copy a complete source to a URL: checksums are compared, it is resumable, the manifest is written last.

    S3 is listed; for the other stores of mosaicml-streaming the local copy keeps a record of uploaded files.

    Raises:
        DataError: The URL cannot be written, or holds another source and `overwrite` is not given.
    """
    if url.startswith("s3://"):
        from data_tools.stores.sync import sync

        sync(str(source), url, overwrite=overwrite, quiet=quiet)
    else:
        _upload(source, url)


def _published_as(plan: ConversionPlan, url: str, settings: Settings) -> Manifest | None:
    """The manifest at the URL if it equals the plan's; None if the URL is unused or may be replaced.

    Raises:
        DataError: The URL holds another conversion.
    """
    found = _published(url)
    if found is None or (settings.overwrite and identity(found) != identity(plan.manifest)):
        return None
    check_same(url, found, plan.manifest)
    return found


def _published(url: str) -> Manifest | None:
    """The manifest of a complete source at the URL, if there is one.

    Raises:
        DataError: The URL cannot be read.
    """
    if url.startswith("s3://"):
        from data_tools.stores.open import open_store
        from data_tools.stores.sync import fetch_manifest

        store = open_store(url)
        return fetch_manifest(store)[0] if store.stat(MANIFEST) is not None else None
    import stamo_dist._streaming  # noqa: F401  # isort: skip  must precede streaming
    from streaming.base.storage.download import CloudDownloader

    with tempfile.TemporaryDirectory() as folder:
        try:
            CloudDownloader.get(url).download(f"{url}/{MANIFEST}", f"{folder}/{MANIFEST}", timeout=60)
        except FileNotFoundError:
            return None
        except Exception as e:  # each store has errors of its own
            raise DataError(f"{url}: cannot be looked at: {type(e).__name__}: {e}") from e
        return read_manifest(Path(folder))


def _upload(source: Path, url: str) -> None:
    """Upload with mosaicml-streaming's uploader, which supports the other stores."""
    uploader = _uploader(source, url)
    manifest = read_manifest(source)
    ledger = source / LEDGER
    sent: dict[str, str] = json.loads(ledger.read_text()) if ledger.is_file() else {}
    if sent.get("url") != url:
        sent = {"url": url}
    found = (p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and p.name != LEDGER)
    for name in sorted(found, key=lambda name: (name == MANIFEST, name)):
        digest = manifest.checksums.get(name) or hashlib.sha256((source / name).read_bytes()).hexdigest()
        if sent.get(name) == digest:
            continue
        try:
            uploader.upload_file(name)
        except Exception as e:  # each store has errors of its own
            raise DataError(f"{url}/{name}: cannot be written: {type(e).__name__}: {e}; run again to continue") from e
        sent[name] = digest
        temporary = ledger.with_suffix(".tmp")
        temporary.write_text(json.dumps(sent))
        os.replace(temporary, ledger)


def _uploader(source: Path, url: str) -> Any:
    import stamo_dist._streaming  # noqa: F401  # isort: skip  must precede streaming
    from streaming.base.storage.upload import UPLOADERS, CloudUploader

    try:
        return CloudUploader.get((str(source), url), keep_local=True, exist_ok=True)
    except (ValueError, ImportError) as e:
        kinds = ", ".join(f"{scheme}://" for scheme in UPLOADERS if scheme and "/" not in scheme)
        raise DataError(f"{url}: cannot be written: {e}; mosaicml-streaming writes {kinds}") from e
