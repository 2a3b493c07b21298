"""Finding the weight files of a checkpoint, and reading their headers."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from pathlib import Path

from stamo_dist.errors import CheckpointError

Shape = tuple[int, ...]

STEMS = ("diffusion_pytorch_model", "model")
#: File variants in order of preference; "" is full precision.
VARIANTS = ("", "fp16", "bf16")
PICKLED = (".pth", ".pt")  # read only by torch.load(weights_only=True)
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


def index_name(stem: str, variant: str) -> str:
    """The index of sharded weights: diffusers and transformers put the variant before the last dot."""
    return f"{stem}.safetensors.index{variant and '.'}{variant}.json"


def file_name(stem: str, variant: str) -> str:
    return f"{stem}{variant and '.'}{variant}.safetensors"


def weight_files(folder: Path, field: str) -> list[Path]:
    """The safetensors files of a checkpoint folder: one, or those in its index; full precision is preferred.

    Raises:
        CheckpointError: there are none, or some that the index names are missing.
    """
    for variant in VARIANTS:
        for stem in STEMS:
            index, single = folder / index_name(stem, variant), folder / file_name(stem, variant)
            if index.is_file():
                return _of_index(index, field)
            if single.is_file():
                return [single]
    lacks = f"{field}: {folder} has no {STEMS[0]}.safetensors and no {STEMS[1]}.safetensors"
    raise CheckpointError(f"{lacks}; {_how(folder, field)}")


def _of_index(index: Path, field: str) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except OSError as error:
        raise CheckpointError(unreadable(index, field, error)) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{field}: {index} is not a weight index ({error}); download it again") from error
    absent = [n for n in names if Path(n).name != n or not (index.parent / n).is_file()]
    if absent:
        raise CheckpointError(
            f"{field}: {index} names files that are not there: {', '.join(absent)}; copy or download them too"
        )
    return [index.parent / n for n in names]


def _how(folder: Path, field: str) -> str:
    """Advice for a folder whose weights have another form."""
    files = sorted(p.name for p in folder.iterdir() if p.is_file())
    for name in files:
        if name.endswith((".safetensors", *PICKLED)):
            return f"if you mean {name}, set {field}: {folder / name}"
    pickled = [name for name in files if name.endswith((".bin", ".ckpt"))]
    if pickled:
        return (
            f"{', '.join(pickled)} is pickle, which is never opened: save it again as safetensors, with the class's "
            f"from_pretrained({str(folder)!r}).save_pretrained(DIR)"
        )
    return "copy or download the checkpoint again"


def unreadable(path: Path, field: str, error: OSError) -> str:
    """That the system refuses to read a file, and the way out."""
    ways = {
        errno.EACCES: "have its owner make it readable to you (`chmod`), or give another file",
        errno.EPERM: "have its owner make it readable to you (`chmod`), or give another file",
        errno.ENOENT: "give a file that is there",
    }
    way = ways.get(error.errno or 0, "see to the disk that holds it")
    return f"{field}: {path} cannot be read ({error.strerror or error}): {way}"


def header(path: Path, field: str) -> dict[str, Shape]:
    """Name → shape of the tensors of a safetensors file, of which only the header is read.

    Raises:
        CheckpointError: it is not such a file, or shorter than its header states.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _LONGEST_HEADER:
                raise ValueError("it has no safetensors header")
            entries = json.loads(file.read(length))
            there = os.fstat(file.fileno()).st_size
        entries.pop("__metadata__", None)
        size = 8 + length + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        if there != size:
            raise ValueError(f"{there:,} bytes of {size:,}")
        return {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()}
    except OSError as error:
        raise CheckpointError(unreadable(path, field, error)) from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{field}: {path} is corrupt or incomplete ({error}); copy or download it again"
        ) from error


def pickled_names(path: Path, field: str) -> bytes:
    """The pickled bytes with the tensor names of a torch.save file, for searching without unpickling.

    Raises:
        CheckpointError: it is not such a file, or incomplete.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # the zip directory is at the end: a truncated file has none
            name = next(n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl")
            return archive.read(name)
    except OSError as error:
        raise CheckpointError(unreadable(path, field, error)) from error
    except (zipfile.BadZipFile, StopIteration) as error:
        raise CheckpointError(
            f"{field}: {path} is corrupt, incomplete or no file of torch.save; download it again, or write it anew "
            f"with torch.save(torch.load({str(path)!r}, weights_only=True), {str(path)!r})"
        ) from error
