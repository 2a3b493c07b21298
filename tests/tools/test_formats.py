"""Options of formats, as they are given on the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from data_tools.convert.driver import convert
from data_tools.convert.plan import Settings, make_plan
from data_tools.formats import registry as formats
from data_tools.formats.declared import ImageOptions
from stamo_dist.data.schema import read_episodes
from stamo_dist.errors import DataError


@dataclass
class _Reader:
    """A format.

    Args:
        src: Where.
        cameras: Which.
        keys: Names of things,
            in order.
        offset: Seconds.
        strict: Whether.
        mode: How.
    """

    src: Path
    cameras: Sequence[str] | None = None
    keys: Sequence[str] | None = None
    offset: float = 0.0
    count: int | None = 3
    strict: bool = False
    mode: Literal["fast", "slow"] = "fast"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.FORMATS, "made", (f"{__name__}._Reader", "tests"))


@pytest.mark.usefixtures("made")
def test_values_have_the_types_of_the_fields() -> None:
    given = ["keys=a, b", "offset=1e-3", "count=none", "strict=yes", "mode=slow"]
    assert formats.parse_options("made", given) == {
        "keys": ["a", "b"], "offset": 0.001, "count": None, "strict": True, "mode": "slow",
    }  # fmt: skip
    docs = {option.name: option.doc for option in formats.options_of("made")}
    assert docs == {"keys": "Names of things, in order.", "offset": "Seconds.", "count": "", "strict": "Whether.",
                    "mode": "How."}  # fmt: skip


@dataclass
class _Turned(ImageOptions):
    """A format whose images may lie otherwise.

    Args:
        keys: Names.
        image_orientation: See `ImageOptions`.
        strict: Whether.
    """

    keys: Sequence[str] = ()
    strict: bool = False


def test_options_of_a_base_stand_where_the_docstring_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.FORMATS, "turned", (f"{__name__}._Turned", "tests"))
    options = formats.options_of("turned")
    assert [option.name for option in options] == ["keys", "image_orientation", "strict"]
    assert options[1].doc.startswith("How images are stored:")


@pytest.mark.usefixtures("made")
def test_all_wrong_options_are_named_at_once() -> None:
    with pytest.raises(DataError) as caught:
        formats.parse_options("made", ["ofset=1", "count=many", "strict=perhaps", "mode=quick", "keys"])
    text = str(caught.value)
    for part in (
        "ofset: format made has no such option; did you mean offset?", "count=many: must be a whole number",
        "strict=perhaps: must be true or false", "mode=quick: must be one of fast, slow", "--set keys: write KEY=VALUE",
    ):  # fmt: skip
        assert part in text
    with pytest.raises(DataError, match="did you mean offset"):
        formats.open_reader("made", Path(), {"ofset": 1})


def test_a_key_or_a_name_in_it_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.FORMATS, "turned", (f"{__name__}._Turned", "tests"))
    assert formats.parse_options("turned", ["keys=a, b"]) == {"keys": ["a", "b"]}
    with pytest.raises(DataError) as caught:
        formats.parse_options("turned", ["keys=a,b,a"])
    assert str(caught.value) == "--set keys=a,b,a: a given twice; name each once"
    with pytest.raises(DataError) as caught:
        formats.parse_options("turned", ["keys=a", "keys=b", "strict=true", "strict=false"])
    assert str(caught.value).splitlines() == [
        "--set keys: given twice; keep one of them, several values with commas: keys=A,B",
        "--set strict: given twice; keep one of them",
    ]


def test_an_unknown_format_is_refused_with_a_suggestion() -> None:
    with pytest.raises(DataError, match=r"unknown format 'UMI'; the nearest is zarr \(.*Add a format"):
        formats.reader_class("UMI")
    with pytest.raises(DataError, match=r"unknown format 'lerobt'; did you mean lerobot\?.*Add a format"):
        formats.reader_class("lerobt")


def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, cut: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cut(tmp_path / "a.hdf5")
    for package, format in (("pyarrow", "lerobot"), ("scipy", "libero")):
        monkeypatch.setitem(sys.modules, package, None)
        for module in ("data_tools.formats.lerobot", "data_tools.formats.lerobot_files"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        with pytest.raises(DataError, match=rf"needs the package {package}.*install -e .*\[convert\]"):
            make_plan(format, path, "s", Settings())


@pytest.mark.parametrize("format", formats.FORMATS)
def test_every_format_explains_its_options_and_needs_none(format: str) -> None:
    options = formats.options_of(format)
    assert [o.name for o in options if not o.doc] == []
    assert formats.open_reader(format, Path("nowhere"), {"cameras": None})


def test_the_command_lists_formats_and_options(stamo: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    listed = stamo("data", "formats").stdout
    assert all(re.search(rf"^{format}\b", listed, re.MULTILINE) for format in formats.FORMATS)
    assert "image_timing" in stamo("data", "formats", "libero").stdout


def test_the_pages_reader_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code block of "Add a format" converts, and explains its option."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "convert.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page.split("## Add a format")[1], re.DOTALL)
    (tmp_path / "npz_reader_of_the_page.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(formats.FORMATS, "npz", ("npz_reader_of_the_page.NpzReader", "a folder of .npz episodes"))
    src = tmp_path / "raw"
    src.mkdir()
    actions = np.random.default_rng(0).uniform(0, 0.1, (5, 7))
    frames = np.zeros((5, 16, 16, 3), np.uint8)
    np.savez(src / "a.npz", front=frames, action=actions, joints=np.ones((5, 3)), instruction="push")
    np.savez(src / "b.npz", front=frames, joints=np.ones((5, 3)))
    options = formats.parse_options("npz", ["rate_hz=5"])
    manifest, _ = convert("npz", src, tmp_path / "out", size=16, val_fraction=0, quiet=True, options=options)
    assert (manifest.rate_hz, manifest.action_dim, manifest.proprio_dim) == (5, 7, 3)
    assert "action" in manifest.skipped[0]
    assert read_episodes(tmp_path / "out", "train")[0].instruction == "push"
