"""Files of a bucket. Credentials and the endpoint come from the environment, as for mosaicml-streaming."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlparse

from data_tools.stores.multipart import MultipartUpload
from data_tools.stores.store import Advance, DamagedError, Stat, TransientError, is_ours
from stamo_dist.checkpoint.manifest import hasher
from stamo_dist.errors import DataError

#: Files up to this size are sent in one request, so that their ETag is their MD5.
ONE_REQUEST = 1 << 30
_MISSING = ("404", "NoSuchKey", "NotFound")


#: Attempts per request, on top of botocore's own retries.
ATTEMPTS = 5

_F = TypeVar("_F", bound=Callable[..., Any])


def _patient(method: _F) -> _F:
    """Retry a method of S3Store on transient errors, with exponential backoff and jitter."""

    @wraps(method)
    def tried(self: S3Store, *arguments: Any) -> Any:
        for n in range(ATTEMPTS - 1):
            try:
                return method(self, *arguments)
            except TransientError:
                time.sleep(self.pause * 2**n * (0.5 + random.random()))
        return method(self, *arguments)

    return cast(_F, tried)


@contextmanager
def _undone(advance: Advance) -> Iterator[Advance]:
    """Undo the progress of a transfer that fails."""
    moved = 0

    def count(n: int) -> None:
        nonlocal moved
        moved += n
        advance(n)

    try:
        yield count
    except BaseException:
        advance(-moved)
        raise


class S3Store:
    """Files below s3://BUCKET/PREFIX.

    The endpoint is S3_ENDPOINT_URL when set. A file's sha256 is kept in its metadata. Without credentials only public
    buckets can be read. Requests that fail with a transient error are retried.

    Args:
        url: s3://BUCKET/PREFIX.
        pause: Seconds before the second attempt; each further pause doubles.
    """

    def __init__(self, url: str, pause: float = 1.0):
        parsed = urlparse(url)
        if not parsed.netloc:
            raise DataError(f"{url}: no bucket in it; write s3://BUCKET/PREFIX")
        self.url = url.rstrip("/")
        self.pause = pause
        self.local: Path | None = None
        self._bucket, prefix = parsed.netloc, parsed.path.strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._endpoint = os.environ.get("S3_ENDPOINT_URL")
        self._s3, self._anonymous = _client(self._endpoint, url)

    @_patient
    def stat(self, name: str) -> Stat | None:
        from botocore.exceptions import ClientError

        with self._explained("look at", name):
            try:
                head = self._s3.head_object(Bucket=self._bucket, Key=self._prefix + name)
            except ClientError as e:
                if e.response["Error"]["Code"] not in _MISSING:
                    raise
                self._s3.head_bucket(Bucket=self._bucket)
                return None
        etag = head["ETag"].strip('"')
        md5 = etag if re.fullmatch("[0-9a-f]{32}", etag) else ""  # a multipart upload's ETag is not an MD5
        kept = head["Metadata"]
        return Stat(head["ContentLength"], etag, kept.get("sha256", ""), md5, kept.get("digest", ""))

    def sizes(self) -> dict[str, int]:
        return {name: size for name, (size, _) in self.listing().items() if is_ours(name)}

    @_patient
    def listing(self, beginning: str = "") -> dict[str, tuple[int, float]]:
        """Key → (bytes, modification time in seconds since 1970), sorted, with hidden keys.

        Args:
            beginning: Prefix of the keys.
        """
        with self._explained("list", ""):
            pages = self._s3.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + beginning
            )
            items = [item for page in pages for item in page.get("Contents", ())]
        found = {i["Key"].removeprefix(self._prefix): (i["Size"], i["LastModified"].timestamp()) for i in items}
        return {name: found[name] for name in sorted(found)}

    @_patient
    def read(self, name: str) -> bytes:
        with self._explained("read", name):
            return self._s3.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read()

    @_patient
    def fetch(self, name: str, path: Path, advance: Advance) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._explained("read", name), path.open("wb") as file, _undone(advance) as count:
                self._s3.download_fileobj(self._bucket, self._prefix + name, file, Callback=count, Config=_transfer())
        except OSError as e:
            raise DataError(
                f"{path.parent}: cannot be written: {e.strerror or e}; put that right and run it again, it continues"
            ) from e

    @_patient
    def put(self, path: Path, name: str, sha256: str, advance: Advance) -> None:
        with self._explained("write", name), _undone(advance) as count:
            self._s3.upload_file(
                str(path),
                self._bucket,
                self._prefix + name,
                Callback=count,
                ExtraArgs={"Metadata": {"sha256": sha256}},
                Config=_transfer(),
            )

    def put_in_parts(self, path: Path, name: str, digest: str, advance: Advance) -> None:
        """Upload a file with this expected digest in parts; parts sent by a killed upload are not sent again.

        Raises:
            DamagedError: The file has another digest; no object is created.
            DataError: It cannot be read or written.
        """
        key, found = self._prefix + name, hasher(digest)

        @_patient
        def call(store: S3Store, what: str, arguments: dict[str, Any]) -> Any:
            with store._explained("write", name):
                return getattr(store._s3, what)(**arguments)

        def request(what: str, **arguments: Any) -> Any:
            return call(self, what, arguments)

        with _undone(advance) as count:
            upload = MultipartUpload(request, self._bucket, key, {"digest": digest})
            upload.send(path, found.update, count)
            if found.hexdigest() != digest.partition(":")[2]:
                upload.abort()
                raise DamagedError(f"{path}: changed since it was written")
            upload.complete()

    @_patient
    def delete(self, name: str) -> None:
        with self._explained("remove", name):
            self._s3.delete_object(Bucket=self._bucket, Key=self._prefix + name)

    @contextmanager
    def _explained(self, what: str, name: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            ConnectionError,
            HTTPClientError,
            NoCredentialsError,
            PartialCredentialsError,
        )

        where = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except ClientError as e:
            raise self._client_error(e, what, where) from e
        except (BotoCoreError, Boto3Error) as e:
            cause = e.__cause__ or e.__context__
            if isinstance(cause, ClientError):  # boto3 wraps the errors of an upload
                raise self._client_error(cause, what, where) from e
            if isinstance(e, (NoCredentialsError, PartialCredentialsError)):
                raise DataError(f"{where}: cannot {what} it: {e}; {_CREDENTIALS}") from e
            if isinstance(e, (ConnectionError, HTTPClientError)):
                at = self._endpoint or "AWS"
                raise TransientError(
                    f"{where}: {at} cannot be reached: {e}; check the network and S3_ENDPOINT_URL"
                ) from e
            raise TransientError(f"{where}: cannot {what} it: {e}") from e

    def _client_error(self, error: Any, what: str, where: str) -> DataError:
        code = error.response["Error"]["Code"]
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        missing_bucket = code == "NoSuchBucket" or (error.operation_name == "HeadBucket" and status == 404)
        if missing_bucket:
            at = f" at {self._endpoint}" if self._endpoint else ""
            return DataError(
                f"{where}: there is no bucket {self._bucket!r}{at}; create it, or check its name and S3_ENDPOINT_URL"
            )
        if status in (401, 403):
            said = "" if code in ("403", "401") else f" ({code})"
            if self._anonymous:
                return DataError(f"{where}: {status}{said}: may not {what} it without credentials; {_CREDENTIALS}")
            return DataError(
                f"{where}: {status}{said}: these credentials may not {what} it; ask the bucket's owner for "
                "s3:ListBucket, s3:GetObject and, to write, s3:PutObject and s3:DeleteObject, or choose others with "
                "AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if code in _MISSING or status == 404:
            return DataError(f"{where}: missing (404)")
        kind = TransientError if status is None or status >= 500 or status == 429 else DataError
        return kind(f"{where}: cannot {what} it: {error}")


_CREDENTIALS = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`"


def _client(endpoint: str | None, url: str) -> tuple[Any, bool]:
    """A client, and whether it is anonymous (no credentials)."""
    from boto3.session import Session
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    options: dict[str, Any] = {
        "retries": {"total_max_attempts": 4, "mode": "standard"},
        "connect_timeout": 20,
        "read_timeout": 60,
    }
    options["max_pool_connections"] = 64
    try:
        session = Session()
        anonymous = session.get_credentials() is None
        if anonymous:
            options["signature_version"] = UNSIGNED
        region = _region(session)
        return session.client("s3", config=Config(**options), endpoint_url=endpoint, region_name=region), anonymous
    except (BotoCoreError, ValueError) as e:
        raise DataError(f"{url}: S3 cannot be used: {e}") from e


def _region(session: Any) -> str | None:
    # A custom endpoint has no region, but signing needs one.
    return session.region_name or ("us-east-1" if os.environ.get("S3_ENDPOINT_URL") else None)


def _transfer() -> Any:
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(use_threads=False, multipart_threshold=ONE_REQUEST)
