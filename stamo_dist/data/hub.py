"""Shards in a data set of the Hugging Face Hub: hf://datasets/OWNER/NAME[@REVISION][/FOLDER]."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import stamo_dist._streaming  # noqa: F401  # isort: skip  must precede streaming
from streaming.base.storage.download import DOWNLOADER_MAPPINGS, HFDownloader

from stamo_dist.data.at_hand import HUB, HUB_FORM

T = TypeVar("T")


def at_commit(url: str) -> str:
    """The URL with the commit that its revision is now, so that all is read of one commit.

    Raises:
        OSError: It is no such URL, or the Hub does not supply the data set.
    """
    from huggingface_hub import HfApi

    repo, revision, path = _parts(url)
    commit = _asked(lambda: HfApi().dataset_info(repo, revision=revision).sha, repo)
    return f"hf://datasets/{repo}@{commit}{f'/{path}' if path else ''}"


class HubDownloader(HFDownloader):
    """streaming's, with revisions and without progress bars; it leaves nothing beside the file."""

    def _download_file_impl(self, remote: str, local: str, timeout: float) -> None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        repo, revision, path = _parts(remote)
        with tempfile.TemporaryDirectory(dir=Path(local).parent) as scratch:
            found = _asked(
                lambda: hf_hub_download(repo, path, repo_type="dataset", revision=revision, local_dir=scratch), repo
            )
            Path(found).replace(local)


DOWNLOADER_MAPPINGS["hf"] = HubDownloader


def _parts(url: str) -> tuple[str, str | None, str]:
    match = HUB.fullmatch(url)
    if match is None:
        raise OSError(f"not found: {HUB_FORM}")
    return match["repo"], match["revision"], match["path"] or ""


def _asked(call: Callable[[], T], repo: str) -> T:
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.errors import OfflineModeIsEnabled as Offline

    try:
        return call()
    except EntryNotFoundError as e:
        raise OSError(f"not found in the Hub's data set {repo}") from e
    except (RepositoryNotFoundError, GatedRepoError) as e:
        raise OSError(
            f"data set {repo} not found on the Hub; check its name, or, if it is private or gated, `hf auth login`"
        ) from e
    except Offline as e:
        raise OSError("not found without network, as HF_HUB_OFFLINE is set") from e
    except (HfHubHTTPError, OSError) as e:
        raise OSError((str(e).strip() or type(e).__name__).splitlines()[0]) from e
