"""How frames are turned, resized and cropped for a policy, against TensorFlow's own numbers; and who says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from point_world import PointBenchmarks
from raw import write_raw
from rich.console import Console
from test_openvla_folders import STATISTICS, make

from stamo_dist.data.openvla_augmentation import OpenVLAAugmentation, openvla_changed
from stamo_dist.errors import RunError, StamoError
from stamo_dist.evaluate.actions import ActionErrors
from stamo_dist.evaluate.options import ShowOptions
from stamo_dist.evaluate.rollout import PolicyRollout
from stamo_dist.evaluate.shown import PolicyView
from stamo_dist.evaluate.simulators import Setting
from stamo_dist.models.openvla.framing import PRESETS, Framing, Use, centre_crop
from stamo_dist.models.openvla.policy import Policy
from stamo_dist.models.openvla.save import save_pretrained
from stamo_dist.models.policies import load_policy

EXPECTED = np.load(Path(__file__).parent / "goldens/framing/expected.npz")


def apart(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.abs(found.astype(int) - expected.astype(int))


def test_the_augmentation_is_the_official_one() -> None:
    image = torch.from_numpy(EXPECTED["image"])
    for drawn, expected in zip(EXPECTED["draws"].tolist(), EXPECTED["augmented"], strict=True):
        wrong = apart(openvla_changed(image, *drawn).numpy(), expected)
        assert wrong.max() <= 1, "one step of rounding"
        assert (wrong > 0).mean() < 1e-3


def test_augmented_frames_follow_seed_pass_sample_and_view() -> None:
    def changed(seed: int, *place: int) -> np.ndarray:
        image = EXPECTED["image"].copy()
        OpenVLAAugmentation(seed=seed)(image, *place)
        return image

    first = changed(1, 0, 7, 0)
    assert np.array_equal(first, changed(1, 0, 7, 0))
    for other in ((2, 0, 7, 0), (1, 1, 7, 0), (1, 0, 8, 0), (1, 0, 7, 1)):
        assert not np.array_equal(first, changed(*other)), other


def test_frames_reach_a_policy_as_in_the_official_evaluation() -> None:
    assert apart(centre_crop(EXPECTED["image"], 0.9), EXPECTED["cropped"]).max() == 0
    y, x = np.mgrid[:256, :256]
    frame = np.stack([127 + 120 * np.sin(x / 17), 127 + 120 * np.cos(y / 23), (x + y) / 2], -1).astype(np.uint8)
    frame[60:120, 60:150] = [200, 30, 40]
    # The simulator's picture comes upside down; its authors turn it by 180°, against the upright one it is mirrored.
    upright = frame[:, ::-1]
    for name in ("openvla-libero", "oft-libero"):
        seen = np.asarray(PRESETS[name].framing(upright))
        assert seen.shape == (224, 224, 3)
        assert apart(seen[::4, ::4], EXPECTED["evaluated"]).max() <= 1
    assert Framing()(frame) is frame
    for orientation, expected in (
        ("mirrored", frame[:, ::-1]), ("flipped_vertically", frame[::-1]), ("rotated_180", frame[::-1, ::-1]),
    ):  # fmt: skip
        assert np.array_equal(Framing(orientation)(frame), expected)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders without our settings, as the authors' are, whose statistics are of a LIBERO suite."""
    root = tmp_path_factory.mktemp("released")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            save_pretrained(make(kind), root / kind)
            (root / kind / "policy.json").unlink()
            for name in ("world_head.safetensors",):
                (root / kind / name).unlink(missing_ok=True)
            renamed = json.dumps({"libero_spatial_no_noops": STATISTICS["toy"]})
            (root / kind / "dataset_statistics.json").write_text(renamed)
        return root / kind

    return folder


def test_a_released_policy_is_run_as_it_is_said(released: Callable[[str], Path]) -> None:
    folder = released("openvla")
    for use in (Use(), Use(orientation="mirrored"), Use(crop=0.9)):
        with pytest.raises(RunError, match=r"does not say how it sees frames.*--as openvla-libero or oft-libero") as e:
            load_policy(folder, use=use)
        assert all(name in str(e.value) for name in PRESETS)
    policy = load_policy(folder, use=Use("openvla-libero"))
    assert (policy.framing, policy.chunk, policy.cfg.views) == (Framing("mirrored", 0.9, 224), 1, 1)
    frame = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    plain = Policy.from_pretrained(folder)
    expected = plain.act(np.asarray(policy.framing(frame)), "pick up the cup")
    assert np.array_equal(policy.act(frame, "pick up the cup"), expected)
    assert not np.array_equal(policy._look([[frame]]), plain._look([[frame]]))
    # Options win over the preset, and without one they are enough.
    assert load_policy(folder, use=Use("openvla-libero", crop=1.0)).framing == Framing("mirrored", 1.0, 224)
    assert load_policy(folder, use=Use(orientation="upright", crop=1.0)).framing == Framing()
    for wrong, says in (
        ({"preset": "pi0"}, "--as pi0: must be one of openvla-libero, oft-libero"),
        ({"orientation": "sideways"}, "--orientation sideways: must be one of upright, mirrored"),
        ({"crop": 1.5}, "--crop 1.5: must be above 0 and at most 1"),
        ({"bounds": "q98"}, "--bounds q98: must be one of q99, minmax"),
    ):
        with pytest.raises(RunError, match=says):
            Use(**wrong)
    with pytest.raises(
        RunError, match=r"--as oft-libero: .* has no action head .*incomplete; choose one of openvla-libero"
    ):
        load_policy(folder, use=Use("oft-libero"))


def test_what_a_released_oft_policy_leaves_unsaid(released: Callable[[str], Path]) -> None:
    folder = released("oft")
    with pytest.raises(RunError, match=r"--as openvla-libero: .* has an action head.*choose one of oft-libero"):
        load_policy(folder, use=Use("openvla-libero"))
    policy = load_policy(folder, use=Use("oft-libero", chunk=3, bounds="minmax"))
    assert (policy.chunk, policy.cfg.views, policy.cfg.bounds) == (3, 2, "minmax")
    assert load_policy(folder, use=Use(None, "upright", 0.9, 2, 3, "q99")).framing == Framing(crop=0.9)


def test_a_policy_of_ours_says_itself(tmp_path: Path) -> None:
    policy = make("openvla")
    policy.framing = Framing(crop=0.9)
    save_pretrained(policy, tmp_path / "run/model")
    loaded = load_policy(tmp_path / "run")
    assert loaded.framing == Framing(crop=0.9)
    assert load_policy(tmp_path / "run", use=Use(orientation="mirrored")).framing == Framing("mirrored", 0.9)
    with pytest.raises(RunError, match=r"--as, --chunk: .* was trained here and says it itself; leave it out"):
        load_policy(tmp_path / "run", use=Use("oft-libero", chunk=8))
    before = shutil.copytree(tmp_path / "run/model", tmp_path / "before")
    settings = json.loads((before / "policy.json").read_text())
    del settings["framing"]  # as versions before this one wrote it
    (before / "policy.json").write_text(json.dumps(settings))
    assert load_policy(before).framing == Framing()


def test_rollouts_of_a_released_policy(released: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(released("openvla"), tmp_path / "policy")
    column = {"q01": [-1.0] * 3, "q99": [1.0] * 3, "min": [-1.0] * 3, "max": [1.0] * 3}
    (folder / "dataset_statistics.json").write_text(json.dumps({"toy": {"action": column}}))
    options: dict[str, Any] = {
        "tasks": ["suite/one"], "benchmark": "toy", "trials": 1, "processes": 1, "out": tmp_path / "out",
    }  # fmt: skip
    with pytest.raises(RunError, match=r"does not say how it sees frames.*--as PRESET"):
        PolicyRollout(str(folder), benchmarks=PointBenchmarks(), **options).evaluate()
    said = Console(file=StringIO(), width=200)
    found = PolicyRollout(str(folder), benchmarks=PointBenchmarks(), as_="openvla-libero", **options).evaluate(said)
    assert found is not None
    assert (found.rows[0]["trials"], found.rows[0]["success"]) == (1, 100)
    assert found.settings["framing"] == {"orientation": "mirrored", "crop": 0.9, "resize": 224}
    assert found.settings["finely"], "drawn as the benchmark's own renderer does"
    assert (
        "toy: front at 256 px, mirrored, JPEG and Lanczos to 224 px, centre crop of 0.9 of the area; "
        "1 of 1 actions taken at a time (openvla), scaled as toy (q99)"
    ) in said.file.getvalue()


def test_cameras_in_another_order_are_refused() -> None:
    named = ShowOptions(cameras=["eye_in_hand", "agentview"])
    with pytest.raises(RunError, match=r"--cameras eye_in_hand,agentview: its authors show it agentview, eye_in_hand"):
        PolicyView.to("nowhere", PointBenchmarks(), named, PRESETS["oft-libero"])
    shown = PolicyView.to("nowhere", PointBenchmarks(), ShowOptions(), PRESETS["oft-libero"])
    assert shown.setting == Setting(256, ("agentview", "eye_in_hand"), "openvla", finely=True)


def test_released_weights_against_what_was_done(
    released: Callable[[str], Path], stamo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = write_raw(tmp_path / "raw/low.hdf5")
    stamo("data", "convert", "robomimic", raw.parent, tmp_path / "cans", "--val-fraction", "0.4")
    folder = shutil.copytree(released("openvla"), tmp_path / "policy")
    column = {"q01": [-1.0] * 6 + [0.0], "q99": [1.0] * 6 + [1.0], "min": [-1.0] * 6 + [0.0], "max": [1.0] * 7}
    column |= {"mean": [0.0] * 7, "mask": [True] * 6 + [False]}
    (folder / "dataset_statistics.json").write_text(json.dumps({"cans_no_noops": {"action": column}}))
    options: dict[str, Any] = {"shards": str(tmp_path / "cans"), "as_": "openvla-libero", "frames": 10**6}
    options |= {"out": tmp_path / "out", "unnorm_key": "cans"}

    def still(self: Policy, images: Any, texts: Any, **_: Any) -> np.ndarray:
        return np.tile([0.5] * 6 + [1.0], (len(images), 1, 1))  # half to the right of everything, and open

    monkeypatch.setattr(Policy, "act_batch", still)
    said = Console(file=StringIO(), width=200)
    found = ActionErrors(str(folder), **options).evaluate(said)
    held_out = {line["id"] for line in map(json.loads, (tmp_path / "cans/val/episodes.jsonl").open())}
    with h5py.File(raw) as file:
        done = np.concatenate([np.array(file["data"][name.rsplit("/", 1)[1]]["actions"]) for name in held_out])
    wrong = np.abs(0.5 - done[:, :6]).sum() + np.abs(1 - (1 - done[:, 6]) / 2).sum()
    assert found.rows[0]["frames"] == len(done) == 20
    assert found.rows[0]["mae"] == pytest.approx(wrong / done.size, rel=1e-5)
    assert found.rows[0]["source"] == "cans_no_noops"
    assert "cans_no_noops: agentview; mirrored, JPEG and Lanczos to 224 px, centre crop of 0.9" in said.file.getvalue()
    assert "1 actions at a time (openvla), scaled by q99" in said.file.getvalue()
    plain = json.loads((tmp_path / "cans/manifest.json").read_text())
    (tmp_path / "cans/manifest.json").write_text(json.dumps({**plain, "gripper": None}))
    with pytest.raises(StamoError, match=r"--actions openvla: .* does not say which of its numbers is the gripper"):
        ActionErrors(str(folder), **options).evaluate()
    (tmp_path / "cans/manifest.json").write_text(json.dumps(plain))
    for changes, says in (
        ({"shards": None}, r"is no run folder; say with --shards"),
        ({"out": None}, r"is no run folder; say with --out"),
        ({"as_": None}, r"does not say how it sees frames"),
        ({"split": "test"}, r"has no 'test' split \(its splits: train, val\); choose another --split"),
        ({"unnorm_key": None}, r"is robomimic, and the policy is one of libero; choose other --shards, or with"),
        ({"cameras": ["wrist"]}, r"--cameras wrist: .* has agentview; name 1 of them"),
        ({"actions": "metres"}, r"--actions metres: must be one of delta, original, openvla"),
        ({"unnorm_key": "bridge"}, r"bridge"),
    ):
        with pytest.raises(StamoError, match=says):
            ActionErrors(str(folder), **{**options, **changes}).evaluate()
