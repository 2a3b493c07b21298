"""Images, action tokens, statistics and prompts against the official implementation's outputs."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image
from vla_cases import INSTRUCTIONS, SPACE, Golden, close, goldens, text_tokenizer

from stamo_dist.errors import CheckpointError, DataError
from stamo_dist.models.openvla.actions import ActionTokenizer, Statistics
from stamo_dist.models.openvla.config import OPENVLA_7B, OpenVLAConfig
from stamo_dist.models.openvla.images import ImageProcessor
from stamo_dist.models.openvla.text import SampleIds, TextTokenizer, collate, prompt, with_space

#: Python 3.10 has no Pillow 13, with which the expected pixels were made; earlier ones round otherwise in resampling.
AS_THEN = Version(version("pillow")) >= Version("13")


def processor(folder: Path, size: int) -> ImageProcessor:
    config = OpenVLAConfig.from_dict({**OPENVLA_7B, "image_sizes": [size, size]}, "test")
    return ImageProcessor.from_folder(folder, config)


@pytest.mark.parametrize(
    ("case", "size"),
    [
        ("exact_resize-naive_56", 56),
        ("exact_resize-crop_56", 56),
        ("exact_letterbox_56", 56),
        ("released_resize-naive_224", 224),
    ],
)
def test_pixels_are_the_official_ones(case: str, size: int, tmp_path: Path) -> None:
    folder = goldens(f"image_processing/{case}")
    process = processor(folder, size)
    arrays = np.load(goldens("image_processing/images.npz"))
    with np.load(folder / "expected.npz") as expected:
        for name, pixels in expected.items():
            image = arrays[name] if name in arrays else Image.open(goldens(f"image_processing/{name}.png"))
            differ = (process([image]) - torch.from_numpy(pixels)[0]).abs().max()
            assert differ == 0 if AS_THEN else differ < 4 / (255 * 0.224), name  # 3 of 255 levels
    # What we export reads back as the same processor.
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(process.to_dict()))
    assert processor(tmp_path, size) == process


def test_without_a_file_the_release_s_statistics_hold(tmp_path: Path) -> None:
    assert processor(tmp_path, 224) == processor(goldens("image_processing/released_resize-naive_224"), 224)


def test_frames_of_the_towers_size_need_no_pil() -> None:
    frame = np.load(goldens("image_processing/images.npz"))["sq224"]
    process = processor(Path("nowhere"), 224)
    assert torch.equal(process.normalise(torch.from_numpy(frame)[None])[0], process([frame]))
    views = process([frame, frame[::-1].copy()])
    assert views.shape == (12, 224, 224)
    assert torch.equal(views[:6], process([frame]))
    with pytest.raises(ValueError, match=r"not uint8 \(B, 224"):
        process.normalise(torch.zeros(1, 56, 56, 3, dtype=torch.uint8))


def test_action_tokens_are_exact() -> None:
    cases = np.load(goldens("action_tokenizer/action_tokenizer.npz"))
    coder = ActionTokenizer()
    assert coder.begin == 31743
    assert np.array_equal(coder.edges, cases["bins"])
    assert np.array_equal(coder.centres, cases["bin_centers"])
    names = {name.rsplit(".", 1)[0] for name in cases if name.endswith(".actions")}
    assert len(names) == 12
    for name in names:
        ids = coder.encode(cases[f"{name}.actions"])
        assert np.array_equal(ids, cases[f"{name}.token_ids"]), name
        assert np.array_equal(coder.decode(ids), cases[f"{name}.decoded"]), name
    assert np.array_equal(coder.decode(cases["all_ids.token_ids"]), cases["all_ids.decoded"])
    with pytest.raises(DataError, match="NaN"):
        coder.encode(np.array([0.0, np.nan]))
    assert (ActionTokenizer(1000, 64, -2, 2).begin, ActionTokenizer(1000, 64, -2, 2).encode(np.array([2.0]))) == (
        935,
        936,
    )


def test_prompts_and_training_ids() -> None:
    cases = json.loads(goldens("prompts/prompts.json").read_text())
    for case in cases["prompts"]:
        assert prompt(case["instruction"]) == case["prompt"]
        assert with_space(list(case["input_ids"]), SPACE) == case["input_ids_predict_action"]
    front = with_space(list(cases["prompts"][0]["input_ids"]), SPACE)
    for case in cases["roundtrip"]:
        batch = collate([SampleIds(front, [*case["action_ids"], 2], True), SampleIds(front[:5], [], True)], pad=32000)
        assert batch.input_ids[0].tolist() == [*case["training_ids_without_eos"], 2]
        assert batch.labels[0].tolist() == [-100] * len(front) + [*case["action_ids"], 2]
        assert batch.attention_mask.sum(1).tolist() == [len(front) + 8, 5]
    assert prompt("Wave", "v01").endswith("questions. USER: What action should the robot take to wave? ASSISTANT:")
    with pytest.raises(DataError, match="no instruction"):
        prompt(" ")


def test_a_tokenizer_made_from_instructions(tmp_path: Path) -> None:
    text = text_tokenizer()
    text.save(tmp_path)
    again = TextTokenizer.from_folder(tmp_path, text.pad)
    for instruction in INSTRUCTIONS:
        ids = again.prompt_ids(instruction)
        assert ids == text.prompt_ids(instruction)
        assert (ids[0], ids[-1]) == (again.bos, again.space)
        assert again.tokenizer.decode(ids[1:-1]) == prompt(instruction)
        assert max(ids) < 512 - 256  # the last 256 ids are the actions'
    assert again.tokenizer.id_to_token(511) == "<action_255>"
    assert again.tokenizer.token_to_id("<PAD>") == 512
    # Unseen letters are one unknown id each and no error.
    assert again.tokenizer.token_to_id("<unk>") in again.prompt_ids("öffne")
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json; copy the tokenizer of the checkpoint there"):
        TextTokenizer.from_folder(tmp_path / "none", 0)


def test_training_batches_with_and_without_actions() -> None:
    text = text_tokenizer()
    ids = ActionTokenizer(512).encode(np.zeros((2, 3)))
    causal = text.encode(INSTRUCTIONS[:2], [ids, None])
    assert (causal.labels[0] != -100).sum() == 7
    assert (causal.labels[1] == -100).all()
    assert causal.attention_mask.sum(1).tolist() == [causal.prompts[0] + 7, causal.prompts[1]]
    parallel = text.encode(INSTRUCTIONS[:2], [ids, None], blanks=6)
    assert (parallel.labels[1] == -100).all()
    assert parallel.attention_mask.sum(1).tolist() == (parallel.prompts + 7).tolist()


def test_normalisation_there_and_back() -> None:
    golden = Golden("oft/libero_dev")
    statistics = Statistics.read(golden.folder, {})
    actions = statistics.range(None, "action")
    inside = np.random.default_rng(0).uniform(actions.low, actions.high, (5, 4, 7))
    np.testing.assert_allclose(actions.restore(actions.normalise(inside), epsilon=True), inside, atol=1e-9)
    assert np.array_equal(actions.normalise(inside)[..., 6], inside[..., 6])  # the gripper, outside the mask
    assert actions.normalise(inside + 100)[..., :6].max() == 1
    proprio = statistics.range("libero_toy", "proprio")
    for i in range(4):
        expected = golden.inputs[f"predict{i}.proprio_normalized"]
        close(proprio.normalise_proprio(golden.inputs[f"predict{i}.proprio_raw"].numpy()), expected, 1e-12)
    still = Statistics({"a": {"action": {"min": [0, 1], "max": [2, 1], "q01": [0, 1], "q99": [2, 1]}}}, "here")
    assert still.range("a", "action").normalise(np.array([1.0, 7.0])).tolist() == [pytest.approx(0, abs=1e-8), 0]


def test_missing_statistics_are_named() -> None:
    column = {"q01": [0, 0], "q99": [1, 1]}
    statistics = Statistics({"libero_goal_no_noops": {"action": column}, "bridge": {"action": {"q01": [0]}}}, "S.json")
    assert len(statistics.range("libero_goal", "action")) == 2
    for name, field, message in [
        (None, "action", "S.json has statistics of libero_goal_no_noops, bridge: name one"),
        ("droid", "action", "S.json has no statistics of 'droid'"),
        ("libero_goal", "proprio", r"S.json: libero_goal_no_noops.proprio is missing; .*stamo data stats"),
        ("bridge", "action", "S.json: bridge.action: q99 is missing"),
    ]:
        with pytest.raises(DataError, match=message):
            statistics.range(name, field)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="statistics are of 2 dimensions"):
        statistics.range("libero_goal", "action").normalise(np.zeros(3))
