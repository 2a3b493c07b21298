"""Resumable upload of large files to a bucket in parts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_tools.stores.store import Advance
from stamo_dist.errors import DataError

PART = 32 << 20  # bytes
_MOST_PARTS = 9000  # S3's limit is 10,000


def part_size(size: int) -> int:
    """Bytes of all parts but the last, of a file of so many bytes."""
    return max(PART, -(-size // _MOST_PARTS))


class MultipartUpload:
    """The upload of one file to a key; continues the newest unfinished upload to that key.

    Args:
        call: Makes a request (method of boto3's client, its arguments), with retries.
        bucket, key: The target.
        metadata: The object's metadata.
    """

    def __init__(self, call: Callable[..., Any], bucket: str, key: str, metadata: dict[str, str]):
        self._call, self._at = call, {"Bucket": bucket, "Key": key}
        begun = call("list_multipart_uploads", Bucket=bucket, Prefix=key).get("Uploads", ())
        mine = sorted((u for u in begun if u["Key"] == key), key=lambda u: u["Initiated"])
        self._sent: dict[int, tuple[int, str]] = {}
        if mine:
            self._id = mine[-1]["UploadId"]
            self._sent = {p["PartNumber"]: (p["Size"], p["ETag"].strip('"')) for p in self._parts()}
        else:
            self._id = call("create_multipart_upload", **self._at, Metadata=metadata)["UploadId"]

    def _parts(self) -> Iterator[dict[str, Any]]:
        marker = 0
        while True:
            page = self._call("list_parts", **self._at, UploadId=self._id, PartNumberMarker=marker)
            yield from page.get("Parts", ())
            if not page.get("IsTruncated"):
                return
            marker = page["NextPartNumberMarker"]

    def send(self, path: Path, look: Callable[[bytes], object], advance: Advance) -> None:
        """Send the missing parts; `look` is called with the bytes of every part.

        Raises:
            DataError: The file cannot be read.
        """
        self._etags: list[dict[str, Any]] = []
        try:
            with path.open("rb") as file:
                size = part_size(os.fstat(file.fileno()).st_size)
                number = 0
                while chunk := file.read(size):
                    number += 1
                    look(chunk)
                    etag = hashlib.md5(chunk, usedforsecurity=False).hexdigest()
                    if self._sent.get(number) != (len(chunk), etag):
                        sent = self._call("upload_part", **self._at, UploadId=self._id, PartNumber=number, Body=chunk)
                        etag = sent["ETag"].strip('"')
                    self._etags.append({"PartNumber": number, "ETag": etag})
                    advance(len(chunk))
        except OSError as e:
            raise DataError(f"{path}: cannot be read: {e.strerror or e}") from e

    def complete(self) -> None:
        """Complete the upload: the parts become the object."""
        parts = {"Parts": self._etags}
        self._call("complete_multipart_upload", **self._at, UploadId=self._id, MultipartUpload=parts)

    def abort(self) -> None:
        """Abort the upload and delete its parts."""
        self._call("abort_multipart_upload", **self._at, UploadId=self._id)
