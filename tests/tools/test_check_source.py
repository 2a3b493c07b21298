"""Shards that are not those of the dataset they were converted from are found out, and all others are not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_droid_raw
import test_maniskill
import test_replay_buffer
import typer
from films import film, picture
from records import TEXT, image, png, tensor, write_tfds
from remade import Samples, remake
from test_lerobot import small
from typer.testing import CliRunner

from data_tools.convert.driver import convert
from data_tools.formats import decode
from data_tools.look.check import check
from data_tools.look.check_report import ERROR, WARNING, CheckFinding
from data_tools.look.seek import picture_at
from data_tools.look_cli import register

app = typer.Typer()
register(app)


def moving(count: int) -> list[np.ndarray]:
    """Pictures that tell their number at 32 px too."""
    return [picture(7 * n % 256) for n in range(count)]


STEPS = {"action": tensor("float32", 7), "language_instruction": TEXT, "observation/image": image(64, 64, 3)}


def step(seed: int, length: int = 9) -> dict[str, Any]:
    """The values of an RLDS episode."""
    return {
        "steps/action": np.random.default_rng(seed).normal(size=(length, 7)),
        "steps/language_instruction": [b"push it"] * (length - 2) + [b"let go"] * 2,
        "steps/observation/image": [png(p) for p in moving(length + seed)[seed:]],
        "episode_metadata/file_path": [f"/raw/{seed}".encode()],
    }


def videos(root: Path) -> Path:
    """Reordered frames, a turned picture, and a container without presentation times."""
    film(root / "set/a.mp4", moving(40), b_frames=2)
    film(root / "set/b.mp4", moving(35), rotation=(90, False, False))
    film(root / "set/c.avi", moving(30), codec="mpeg4")
    return root / "set"


def rlds(root: Path) -> Path:
    return write_tfds(root / "set", "new_robot", STEPS, [step(n) for n in range(3)])


#: Its name → the format, how a small dataset of it is written below a folder, and how it is converted.
MADE: dict[str, tuple[str, Callable[[Path], Path], dict[str, Any]]] = {
    "lerobot": ("lerobot", lambda root: small(root / "set"), {"rate_hz": 5.0, "options": {"action_kind": "other"}}),
    "images": ("lerobot", lambda root: small(root / "set", video=False), {}),
    "rlds": ("rlds", rlds, {"options": {"rate_hz": 5.0, "mode": "other"}}),
    "video": ("video", videos, {"rate_hz": 10.0}),
    "zarr": (
        "zarr",
        lambda root: test_replay_buffer.pusht(root / "set.zarr"),
        {"options": {"rate_hz": 10.0, "mode": "other"}},
    ),
    "maniskill": ("maniskill", lambda root: test_maniskill.write(root / "set/a.h5"), {}),
    "droid-raw": ("droid-raw", lambda root: test_droid_raw.write(root / "set").parents[3], {}),
}


@pytest.fixture(params=["libero", *MADE])
def made(request: pytest.FixtureRequest, tmp_path: Path, cut: Callable[..., Path]) -> tuple[Path, Path]:
    """A dataset, and what was converted from it."""
    format, write, settings = MADE.get(request.param) or ("libero", lambda root: cut(root / "a.hdf5"), {})
    raw = write(tmp_path)
    convert(format, raw, tmp_path / "out", size=64, val_fraction=0, processes=1, quiet=True, **settings)
    return raw, tmp_path / "out"


def found(out: Path, raw: Path, **options: Any) -> list[CheckFinding]:
    report = check(str(out), against=raw, quiet=True, processes=1, **options)
    return [f for f in report.findings if f.check == "source"]


def swap(first: int, last: int) -> Callable[[Samples], Samples]:
    """Exchange two pictures of each episode (negative: from its end)."""

    def change(samples: Samples) -> Samples:
        by_episode: dict[str, list[int]] = {}
        for n, sample in enumerate(samples):
            by_episode.setdefault(sample["episode"], []).append(n)
        images = [sample["image"] for sample in samples]
        for members in by_episode.values():
            a, b = members[first], members[last]
            images[a], images[b] = images[b], images[a]
        return [{**sample, "image": image} for sample, image in zip(samples, images, strict=True)]

    return change


def test_what_was_converted_is_what_is_there_and_swapped_pictures_are_not(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    raw, out = made
    report = check(str(out), against=raw, quiet=True, processes=1)
    assert [f for f in report.findings if f.check == "source"] == []
    assert report.looked["compared"] >= 9
    assert report.unseen[0].startswith("frames other than 5 of each episode and camera")
    tampered = remake(out, tmp_path / "swapped", swap(0, -1))
    findings = found(tampered, raw)
    assert findings
    for finding in findings:
        assert (finding.severity, finding.frame, finding.count) == (ERROR, 0, 2)
        assert "grey levels of 255, in the mean, from the dataset's frame 0" in finding.text


def test_a_shift_by_one_frame_is_named(made: tuple[Path, Path], tmp_path: Path) -> None:
    def shift(samples: Samples) -> Samples:
        return [{**s, "image": after["image"]} for s, after in zip(samples, [*samples[1:], samples[-1]], strict=True)]

    raw, out = made
    findings = found(remake(out, tmp_path / "late", shift), raw)
    assert any("it is the one after it" in f.text for f in findings)


def test_a_decoder_that_gives_the_frame_beside_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if conversion's own way through the packets were off by one: the check does not share it."""
    raw = small(tmp_path / "set")
    right = decode._decoded

    def wrong(path: Path, timeline: Any, wanted: np.ndarray) -> Any:
        return right(path, timeline, np.minimum(wanted + 1, len(timeline.ticks) - 1))

    monkeypatch.setattr(decode, "_decoded", wrong)
    convert("lerobot", raw, tmp_path / "out", size=64, val_fraction=0, processes=1, quiet=True)
    findings = found(tmp_path / "out", raw)
    assert [(f.severity, f.episode) for f in findings] == [(ERROR, f"episode_{e:06d}") for e in range(3)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {"action": s["action"] + np.float32(0.01) * (s["t"] == 3)}, "action[0] is"),
        (lambda s: {"proprio": s["proprio"] + np.float32(1)}, "proprio["),
        (lambda s: {"time": s["time"] + 0.02 * (s["t"] > 0)}, "time is 0.07, but 0.05 in the dataset"),
        (lambda s: {"instruction": "put it down"}, "instruction is 'put it down', but 'pick up"),
    ],
)
def test_numbers_and_texts_are_compared_in_full(
    tmp_path: Path, cut: Callable[..., Path], change: Callable[[dict[str, Any]], dict[str, Any]], says: str
) -> None:
    raw = cut(tmp_path / "a.hdf5")
    convert("libero", raw, tmp_path / "out", size=32, val_fraction=0, processes=1, quiet=True)
    other = remake(tmp_path / "out", tmp_path / "other", lambda samples: [{**s, **change(s)} for s in samples])
    findings = found(other, raw)
    assert len(findings) == 3
    assert all(says in f.text and f.severity == ERROR for f in findings)


def test_another_dataset_is_not_this_one(tmp_path: Path) -> None:
    raw = small(tmp_path / "set")
    convert("lerobot", raw, tmp_path / "out", size=32, processes=1, val_fraction=0.3, quiet=True)
    longer = small(tmp_path / "longer", lengths=(12, 16))
    findings = found(tmp_path / "out", longer)
    texts = [f.text for f in findings]
    assert any("its files are not those that were converted" in text for text in texts)
    assert "has 15 frames; " + f"{longer} gives 16" in texts
    assert f"is not an episode of {longer}" in texts
    more = small(tmp_path / "more", lengths=(12, 15, 18, 20))
    (lost,) = (f for f in found(tmp_path / "out", more) if "in no split" in f.text)
    assert (lost.severity, lost.count) == (WARNING, 1)
    assert "the first is episode_000003" in lost.text


def test_options_are_those_of_the_conversion_or_given_again(tmp_path: Path) -> None:
    film(tmp_path / "set/a.mp4", moving(40))
    (tmp_path / "cuts.csv").write_text("video,start,end,text\na.mp4,0.2,0.8,wave\n")
    options = {"segments": [tmp_path / "cuts.csv"], "min_frames": 5}
    manifest, _ = convert("video", tmp_path / "set", tmp_path / "out", size=32, quiet=True, options=options)
    assert manifest.given == {"segments": [str(tmp_path / "cuts.csv")], "min_frames": 5}
    assert found(tmp_path / "out", tmp_path / "set") == []
    moved = shutil.move(tmp_path / "cuts.csv", tmp_path / "moved.csv")
    result = run(["check", str(tmp_path / "out"), "--against", str(tmp_path / "set"), "--set", f"segments={moved}"])
    assert result.exit_code == 0, result.output
    assert "compared 5 of 18 (28 %)" in result.output
    assert "not looked at: frames other than 5 of each episode" in result.output
    assert run(["check", str(tmp_path / "out"), "--set", "min_frames=2"]).exit_code == 2


def run(arguments: Sequence[str]) -> Any:
    return CliRunner().invoke(app, [*arguments, "--quiet", "--processes", "1"])


def test_processes_find_the_same(tmp_path: Path) -> None:
    raw = small(tmp_path / "set")
    convert("lerobot", raw, tmp_path / "out", size=64, val_fraction=0, processes=1, quiet=True)
    swapped = remake(tmp_path / "out", tmp_path / "swapped", swap(0, -1))
    together = check(str(swapped), against=raw, quiet=True, processes=2)
    assert [f for f in together.findings if f.check == "source"] == found(swapped, raw)


def test_pictures_are_found_by_their_time(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", moving(40), b_frames=2)
    for n in (0, 1, 17, 39):
        for seconds in (n / 30, n / 30 + 0.012, n / 30 - 0.012):
            image = picture_at(path, seconds)
            assert image is not None
            assert np.abs(image.astype(int) - moving(40)[n]).mean() < 8
    assert picture_at(film(tmp_path / "a.avi", moving(5), codec="mpeg4"), 0.0) is None
