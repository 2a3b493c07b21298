"""Damage and oddities of converted sources are found, named and told apart."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import typer
from remade import Samples, remake
from typer.testing import CliRunner

from data_tools.convert.driver import convert
from data_tools.look.check import check
from data_tools.look.check_report import ERROR, WARNING, CheckFinding, CheckReport, print_report
from data_tools.look_cli import register
from stamo_dist.data.schema import read_manifest

SHARD = "train/agentview/shard.00000.mds"

app = typer.Typer()
register(app)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, cut: Callable[..., Path]) -> Path:
    """Three real episodes of 12, 15 and 18 frames in three shards, one of them held out."""
    root = tmp_path_factory.mktemp("good")
    raw = cut(root / "a.hdf5")
    convert("libero", raw, root / "libero", size=64, val_fraction=0.3, shard_bytes=30_000, quiet=True)
    return root / "libero"


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "libero", ignore=shutil.ignore_patterns(".*")))


def look(source: Path, **options: Any) -> CheckReport:
    return check(str(source), quiet=True, processes=1, **options)


def found(report: CheckReport, check: str, severity: str) -> list[CheckFinding]:
    return [f for f in report.findings if (f.check, f.severity) == (check, severity)]


def test_a_converted_source_is_right_and_is_verified_once(copy: Path) -> None:
    first = look(copy)
    assert (first.findings, first.fine) == ([], True)
    assert first.looked == first.total == {"frames": 45, "checksums": 3}
    assert first.unchanged == 0
    assert look(copy).unchanged == 3
    shard = copy / SHARD
    content = shard.read_bytes()
    middle = len(content) // 2
    shard.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    damaged = look(copy)
    assert damaged.unchanged == 2
    (finding,) = found(damaged, "checksum", ERROR)
    assert finding.where(damaged.source) == f"{copy}/{SHARD}"
    shard.write_bytes(content)
    assert look(copy).fine


def test_the_record_of_a_source_that_cannot_be_written_is_kept_elsewhere(copy: Path, tmp_path: Path) -> None:
    (copy / ".verified.json").mkdir()
    assert look(copy, cache=tmp_path / "cache").unchanged == 0
    assert look(copy, cache=tmp_path / "cache").unchanged == 3
    moved = copy.rename(tmp_path / "moved")
    assert look(moved, cache=tmp_path / "cache").unchanged == 0


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero_head(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(64))


def garble(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def count_wrongly(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[-1]]) + "\n")


@pytest.mark.parametrize(
    ("name", "damage", "check", "says"),
    [
        (SHARD, truncate, "file", "bytes, but index.json says"),
        (SHARD, Path.unlink, "file", "missing"),
        (SHARD, zero_head, "file", "header does not match"),
        ("train/agentview/index.json", garble, "index", "not an index of shards"),
        ("train/agentview/index.json", Path.unlink, "index", "missing"),
        ("train/episodes.jsonl", garble, "table", "line 2"),
        ("train/episodes.jsonl", count_wrongly, "table", "listed 2 times"),
        ("train/episodes.jsonl", Path.unlink, "table", "missing"),
        ("manifest.json", garble, "manifest", "not a manifest"),
        ("manifest.json", Path.unlink, "manifest", "never finished"),
    ],
)
def test_damaged_files_are_errors_and_the_rest_is_still_looked_at(
    copy: Path, name: str, damage: Callable[[Path], None], check: str, says: str
) -> None:
    damage(copy / name)
    (copy / "val" / "agentview" / "shard.00000.mds").unlink()
    result = CliRunner().invoke(app, ["check", str(copy), "--quiet", "--processes", "1"])
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    report = look(copy)
    findings = [f for f in found(report, check, ERROR) if says in f.text]
    assert findings, report.findings
    assert findings[0].where(report.source).startswith(f"{copy}/{name}")
    if check != "manifest":
        assert [f.split for f in found(report, "file", ERROR) if f.text == "missing"][-1] == "val"


def jpeg(frame: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(frame), 95, colorsubsampling="444")


def edit(**changes: Any) -> Callable[[Samples], Samples]:
    """Change columns of frame 5 of the first episode."""

    def change(samples: Samples) -> Samples:
        for column, value in changes.items():
            samples[5][column] = value(samples[5][column]) if callable(value) else value
        return samples

    return change


def each(samples: Samples, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Samples:
    first = samples[0]["episode"]
    return [{**s, **change(s)} if s["episode"] == first else s for s in samples]


def freeze(samples: Samples) -> Samples:
    return each(samples, lambda s: {"image": samples[2]["image"]} if s["t"] > 2 else {})


def poke(vector: np.ndarray, dimension: int, value: float) -> np.ndarray:
    vector = vector.copy()
    vector[dimension] = value
    return vector


@pytest.mark.parametrize(
    ("change", "check", "severity", "frame", "says"),
    [
        (edit(action=lambda a: poke(a, 2, np.nan)), "number", ERROR, 5, "action is NaN"),
        (edit(proprio=lambda p: poke(p, 0, np.inf)), "number", ERROR, 5, "proprio is NaN"),
        (edit(image=lambda b: b[: len(b) // 2]), "frame", ERROR, 5, "not a whole JPEG"),
        (edit(image=jpeg(np.full((32, 32, 3), 90, np.uint8))), "frame", ERROR, 5, "32 × 32 px, the manifest says 64"),
        (edit(t=9), "episode", ERROR, 9, "has t 9, expected 5"),
        (edit(length=99), "episode", ERROR, None, "says it has 99 frames"),
        (edit(camera="other"), "episode", ERROR, None, "camera is"),
        (edit(time=0.1), "time", ERROR, 4, "goes back"),
        (edit(image=jpeg(np.zeros((64, 64, 3), np.uint8))), "blank", WARNING, 5, "black"),
        (edit(image=jpeg(np.full((64, 64, 3), 90, np.uint8))), "blank", WARNING, 5, "one colour"),
        (freeze, "frozen", WARNING, 2, "equal the one before"),
        (edit(action=lambda a: poke(a, 0, 30.0)), "action", WARNING, 5, "dx is 30"),
        (edit(action=lambda a: poke(a, 6, -1.0)), "action", WARNING, 5, "gripper (dimension 6) is -1"),
        (lambda ss: each(ss, lambda s: {"time": s["time"] + (s["t"] > 5)}), "time", WARNING, 5, "21.0 periods"),
        (lambda ss: each(ss, lambda s: {"time": s["time"] / 8}), "time", WARNING, None, "160 frames a second"),
    ],
)
def test_what_is_wrong_inside_is_named(
    good: Path, tmp_path: Path, change: Callable[[Samples], Samples], check: str, severity: str, frame: int | None,
    says: str,
) -> None:  # fmt: skip
    source = remake(good, tmp_path / "libero", change)
    report = look(source)
    findings = found(report, check, severity)
    assert len(findings) == 1, report.findings
    assert says in findings[0].text
    first = json.loads((good / "train" / "episodes.jsonl").read_text().splitlines()[0])["id"]
    assert (findings[0].episode, findings[0].frame) == (first, frame)
    assert findings[0].where("S").startswith(f"S/train/agentview/shard.00000.mds, episode {first}")
    assert report.fine == (severity == WARNING)


def test_an_episode_split_over_two_shards_is_an_error(good: Path, tmp_path: Path) -> None:
    report = look(remake(good, tmp_path / "libero", lambda samples: samples, shard_bytes=20_000))
    assert any("is split over shards" in f.text for f in found(report, "episode", ERROR))


def test_episodes_that_differ_from_the_table_are_errors(good: Path, tmp_path: Path) -> None:
    source = remake(good, tmp_path / "libero", lambda samples: [s for s in samples if s["t"] != 3])
    report = look(source)
    assert any("counts 30 frames" in f.text or "the manifest says" in f.text for f in found(report, "table", ERROR))
    assert found(report, "episode", ERROR)


def test_held_out_episodes_that_are_trained_on_are_seen(good: Path, tmp_path: Path) -> None:
    source = tmp_path / "libero"
    shutil.copytree(good, source, ignore=shutil.ignore_patterns(".*"))
    shutil.rmtree(source / "val")
    shutil.copytree(source / "train", source / "val")
    manifest = read_manifest(source)
    sums = {k: v for k, v in manifest.checksums.items() if k.startswith("train")}
    sums |= {k.replace("train", "val", 1): v for k, v in sums.items()}
    splits = {"train": manifest.splits["train"], "val": manifest.splits["train"]}
    changed = manifest.model_copy(update={"checksums": sums, "splits": splits})
    (source / "manifest.json").write_text(changed.model_dump_json())
    findings = found(look(source), "duplicate", WARNING)
    assert len(findings) == manifest.splits["train"].episodes
    assert {f.split for f in findings} == {"val"}
    assert "of split train" in findings[0].text


def test_an_instruction_that_was_changed_in_the_table_is_an_error(copy: Path) -> None:
    path = copy / "train" / "episodes.jsonl"
    path.write_text(path.read_text().replace("pick up", "put down", 1))
    (finding,) = found(look(copy), "episode", ERROR)
    assert "put down the black bowl" in finding.text


def test_a_wrong_dimension_is_an_error(copy: Path) -> None:
    manifest = read_manifest(copy).model_copy(update={"action_dim": 8})
    (copy / "manifest.json").write_text(manifest.model_dump_json())
    (finding, *_) = found(look(copy), "index", ERROR)
    assert "column action is ndarray:float32:7" in finding.text
    assert "ndarray:float32:8" in finding.text


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_dimension_that_stands_still_has_no_outliers(good: Path, tmp_path: Path, noise: float) -> None:
    def still(samples: Samples) -> Samples:
        for n, sample in enumerate(samples):
            sample["action"] = np.append(np.float32(0.3 + noise * (n == 5)), sample["action"][1:])
        return samples

    report = look(remake(good, tmp_path / "libero", still, splits=("train", "val")))
    assert found(report, "action", WARNING) == []


def test_fast_looks_at_some_frames_of_every_episode_and_says_how_many(good: Path, tmp_path: Path) -> None:
    source = remake(good, tmp_path / "libero", freeze)
    report = look(source, fast=True)
    assert report.looked["frames"] == 3 * 3
    assert "frames 9 of 45 (20 %)" in report.shares()
    assert found(report, "frozen", WARNING)
    (source / "train/agentview/shard.00000.mds").unlink()
    assert not look(source, fast=True).fine


def test_processes_find_the_same_and_json_has_it_all(good: Path, tmp_path: Path) -> None:
    source = remake(good, tmp_path / "libero", edit(action=lambda a: poke(a, 2, np.nan)))
    alone = look(source)
    out = tmp_path / "report.json"
    (source / ".verified.json").unlink()
    together = check(str(source), quiet=True, processes=2)
    assert together == alone
    result = CliRunner().invoke(app, ["check", str(source), "--quiet", "--processes", "1", "--json", str(out)])
    assert result.exit_code == 1
    said = json.loads(out.read_text())
    assert (said["errors"], said["findings"][0]["frame"]) == (1, 5)
    assert "error number: 1 (actions, proprio and times are finite)\n  " in result.stdout
    assert "frame 5: action is NaN or infinite" in result.stdout.replace("\n", " ")
    assert "not looked at: whether frames, actions and instructions are those of the dataset" in result.stdout
    assert said["unseen"] == alone.unseen == look(source).unseen
    assert "split val" in look(source, split="train").unseen


def test_the_table_fits_a_terminal_of_80_columns(
    good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    report = CheckReport(str(good))
    print_report(report)
    lines = [re.sub(r"\x1b\[\d*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 80
    assert len(lines) < 30, "no block of lines for each check"
    assert re.sub(r"\s+", " ", " ".join(lines)).count("contiguous, in one shard, and as episodes.jsonl says") == 1
