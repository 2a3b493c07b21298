"""Uploading an exported folder to the Hub, in one commit. `HF_ENDPOINT` names another server, `HF_TOKEN` the token."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from stamo_dist.errors import RunError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_EMPTY = {".gitattributes"}  # what a new repository holds
_ABOUT = ("stamo.json", "policy.json", "config.json")


class HubRepository:
    """A model repository of the Hub that a folder goes to; made, where it is not there, before the folder is written.

    Args:
        name: OWNER/NAME.
        private: Whether a new one is private.
        update: Whether it may have files, which the upload replaces.

    Raises:
        RunError: The name is none, there is no token, the Hub refuses it or is out of reach, or it has files.
    """

    def __init__(self, name: str, *, private: bool = False, update: bool = False):
        self.name = name
        _check_name(name)

        from huggingface_hub import HfApi, get_token

        token = get_token()
        if not token:
            raise RunError(f"--push {name}: there is no token of the Hub; run `hf auth login`, or set HF_TOKEN")
        self._api, self._token = HfApi(token=token), token
        self._make(private, update)

    def again(self, folder: Path) -> tuple[str, ...]:
        """The words after `stamo` that upload `folder`, once it is written."""
        return ("export", str(folder), "--push", self.name, "--update")

    def upload(self, folder: Path) -> str:
        """Upload all files of `folder`, replacing what was there, and return the address of the commit.

        Raises:
            RunError: The Hub refuses it or is out of reach; `folder` stays.
        """
        try:
            done = self._api.upload_folder(
                repo_id=self.name, folder_path=folder, delete_patterns="*", commit_message="Upload by stamo export"
            )
        except (OSError, ValueError) as error:
            again = shlex.join(["stamo", *self.again(folder)])
            raise self._problem(error, f"; {folder} is whole: `{again}` uploads it again") from None
        return str(done.commit_url)

    def _make(self, private: bool, update: bool) -> None:
        try:
            self._api.create_repo(self.name, private=private, exist_ok=True)
            files = set(self._api.list_repo_files(self.name)) - _EMPTY
        except (OSError, ValueError) as error:
            raise self._problem(error) from None
        if files and not update:
            raise RunError(f"--push {self.name}: exists and has files; give another name, or --update to replace them")

    def _problem(self, error: Exception, more: str = "") -> RunError:
        return RunError(f"--push {self.name}: {_why(error, self._api).replace(self._token, '…')}{more}")


def _check_name(name: str) -> None:
    if not _ID.fullmatch(name):
        raise RunError(f"--push {name}: give OWNER/NAME, as in my-lab/policy-drawer, of a–z, A–Z, 0–9, _, - and .")

    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise RunError(f"--push {name}: is no name of the Hub's: {str(error).splitlines()[0]}") from None


def check_exported(folder: Path, name: str) -> None:
    """Raises: RunError: `stamo export` has not written this folder."""
    if not (folder / "README.md").is_file() or not any((folder / about).is_file() for about in _ABOUT):
        raise RunError(f"--push {name}: {folder} is no exported folder; give OUT, which is uploaded once it is written")


def _why(error: Exception, api: HfApi) -> str:
    """What is wrong and the way out, in one line."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it where there is network"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status == 401:
        return "the Hub does not know the token (401); run `hf auth login` with a new one, or set HF_TOKEN"
    if status == 403:
        return "the token may not write there (403); give one of the role write, and an OWNER that it belongs to"
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if status is None and isinstance(error, OSError):
        return f"{api.endpoint} cannot be reached ({type(error).__name__}); try again where there is network"
    return f"the Hub refused it ({said}); try again, or upload the folder on its page"
