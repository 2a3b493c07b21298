"""The picture of a source shows its frames the way they are stored, and its actions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import typer
from PIL import Image
from remade import read, remake
from typer.testing import CliRunner

from data_tools.convert.driver import convert
from data_tools.look.preview import evenly, preview
from data_tools.look.preview_page import COLOURS, GAP, LABELS, MARGIN, WIDTH, WRAP, _short
from data_tools.look_cli import register
from stamo_dist.errors import DataError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, cut: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("preview")
    convert("libero", cut(root / "a.hdf5"), root / "libero", size=128, val_fraction=0, quiet=True)
    return root / "libero"


def holds(picture: np.ndarray, frame: bytes, side: int) -> bool:
    """Whether the upper half of this frame is the first of some row of the picture, at this size."""
    decoded = Image.fromarray(simplejpeg.decode_jpeg(frame))
    wanted = np.asarray(decoded.resize((side, side), Image.Resampling.LANCZOS))[: side // 2].astype(int)
    left = MARGIN + LABELS
    places = (picture[y : y + side // 2, left : left + side] for y in range(len(picture) - side // 2))
    return any(np.abs(place - wanted).mean() < 2 for place in places)


def test_frames_are_shown_the_way_they_are_stored(source: Path, tmp_path: Path) -> None:
    path = preview(str(source), tmp_path, frames=8)
    assert path == tmp_path / "preview_libero.png"
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape[1] == 1280
    first = read(source, "train", "agentview")[0]["image"]
    side = (WIDTH - 2 * MARGIN - LABELS) // 8 - GAP
    assert holds(picture, first, side)
    flipped = remake(source, tmp_path / "flipped", lambda samples: [{**s, "image": turn(s["image"])} for s in samples])
    upside_down = np.asarray(Image.open(preview(str(flipped), tmp_path / "flipped.png")).convert("RGB"))
    assert not holds(upside_down, first, side)
    for colour in COLOURS[:3]:  # dx, dy, dz
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(picture[picture.shape[0] // 2 :].astype(int) - rgb) <= 2).all(2).sum() > 50


def test_an_episode_has_its_own_name_however_long() -> None:
    named = [f"pick_up_the_black_bowl_and_place_it_on_the_plate_demo/demo_{n}" for n in (0, 10)]
    for id in named:
        assert _short(id) == f"…{id[-30:]}"
        assert len(_short(id)) == WRAP
    assert _short("a/demo_10") == "a/demo_10"


def turn(frame: bytes) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(simplejpeg.decode_jpeg(frame)[::-1]), 95)


def test_several_sources_and_what_has_no_actions(
    source: Path, tmp_path: Path, sample_data: Callable[[str], Path]
) -> None:
    human = tmp_path / "human"
    convert("video", sample_data("human_video"), human, size=64, val_fraction=0, max_episodes=1, quiet=True)
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["preview", str(source), str(human), "--out", str(tmp_path / "pictures")])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["preview_human.png", "preview_libero.png"]
    assert Image.open(tmp_path / "pictures" / "preview_human.png").size[0] == 1280


def test_moments_are_evenly_spaced_in_time_not_in_number() -> None:
    times = np.array([0.0, 0.1, 0.2, 0.3, 5.0, 9.9, 10.0])
    assert evenly(times, 3).tolist() == [0, 4, 6]
    assert evenly(times[:1], 8).tolist() == [0]
    assert evenly(times[:2], 8).tolist() == [0, 1]


def test_a_damaged_source_is_named(source: Path, tmp_path: Path) -> None:
    copy = remake(source, tmp_path / "libero", lambda samples: samples)
    shard = copy / "train/agentview/shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"shard.00000.mds: \d+ bytes, but index.json says"):
        preview(str(copy), tmp_path)
    with pytest.raises(DataError, match=r"name it \.png"):
        preview(str(source), tmp_path / "a.jpg")


def test_what_has_no_ending_is_a_folder_and_is_made(source: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    register(app)
    for out, written in (("pictures/", "pictures/preview_libero.png"), ("one/a.png", "one/a.png")):
        result = CliRunner().invoke(app, ["preview", str(source), "--out", f"{tmp_path}/{out}"])
        assert result.output.strip() == str(tmp_path / written)
        assert (tmp_path / written).is_file()
    two = [str(source), str(source), "--out", str(tmp_path / "b.png")]
    refused = re.sub(r"[│\s]+", " ", CliRunner().invoke(app, ["preview", *two]).output)
    assert "is one file, but there are 2 sources; give a folder" in refused
