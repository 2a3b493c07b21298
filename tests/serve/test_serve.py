"""A served policy answers what it answers in Python, to clients of OpenVLA and of OFT, and names what is wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy_policy import TEXTS

json_numpy = pytest.importorskip("json_numpy", reason="needs the [serve] extra: pip install -e '.[serve]'")
requests = pytest.importorskip("requests", reason="needs the [dev] extra: pip install -e '.[dev]'")
uvicorn = pytest.importorskip("uvicorn", reason="needs the [serve] extra: pip install -e '.[serve]'")

from speaking import JSON, frames, post  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def test_the_tokenizer_s_decoder_need_not_be_there(
    export: Callable[..., Path], served: Callable[..., str], toy_policy: Path, tmp_path: Path
) -> None:
    """What is answered is what the whole tokenizer, read and held, makes of it."""
    from stamo_dist.models.openvla.stamo import StamoVision
    from stamo_dist.models.policies import load_policy
    from stamo_dist.models.state_encoder import StateEncoder
    from stamo_dist.models.tokenizer import Tokenizer

    folder, half = export("regression"), shutil.copytree(toy_policy / "tokenizer", tmp_path / "tokenizer")
    for part in ("transformer", "vae"):
        shutil.rmtree(half / part)
    whole = load_policy(folder)
    whole.vision = StamoVision(StateEncoder.of(Tokenizer.from_pretrained(toy_policy / "tokenizer")))
    (frame,) = frames(1)
    found = post(served(load_policy(folder, tokenizer=half)), {"image": frame, "instruction": TEXTS[0]})
    assert np.array_equal(found, whole.act(frame, TEXTS[0]))


def test_clients_of_openvla(export, served) -> None:
    from stamo_dist.models.policies import load_policy

    policy = load_policy(export("tokens"))
    url = served(policy)
    a, b = frames(2)
    payload = {"image": a, "instruction": TEXTS[0], "unnorm_key": "a"}
    expected = policy.act(a, TEXTS[0])
    assert np.array_equal(post(url, payload), expected)
    wrapped = post(url, {"encoded": json_numpy.dumps(payload)})
    assert np.array_equal(json_numpy.loads(wrapped), expected)
    both = post(url, {"observations": [payload, {"image": [b], "instruction": TEXTS[1]}]})
    assert np.allclose(both, policy.act_batch([[a], [b]], TEXTS))

    about = requests.get(f"{url}/health", timeout=30).json()
    assert (about["status"], about["chunk"], about["unnorm_keys"], about["requests"]) == ("ok", 2, ["a"], 3)
    assert about["latency"]["median_ms"] > 0
    for field, wrong in {
        "image": {"instruction": "x"},
        "instruction": {"image": a},
        "unnorm_key": {"image": a, "instruction": "x", "unnorm_key": "nothing"},
        "observations": {"observations": []},
        "observations[1].image": {"observations": [payload, {"image": a.astype(float), "instruction": "x"}]},
        "encoded": {"encoded": "{"},
    }.items():
        said = post(url, wrong, code=400)
        assert said["field"] == field, said
        assert field in said["error"]
    assert "2 views (image[0], image[1]), the policy looks at 1" in post(
        url, {"image": [a, b], "instruction": "x"}, code=400
    )["error"]  # fmt: skip
    assert requests.post(f"{url}/act", data="not JSON", headers=JSON, timeout=30).json()["field"] == "body"


def test_clients_of_oft(export, served) -> None:
    from stamo_dist.models.policies import load_policy

    policy = load_policy(export("regression", views=3, proprio=True))
    url = served(policy, unnorm_key="a")
    (full, left, right), felt = frames(3), np.array([1.0, 2.0])
    payload = {"left_wrist": left, "full_image": full, "right_wrist": right, "state": felt, "instruction": TEXTS[0]}
    found = post(url, payload)
    assert isinstance(found, list)
    expected = policy.act([full, left, right], TEXTS[0], proprio=felt)
    assert np.allclose(found, expected, atol=1e-6)
    assert not np.allclose(found, policy.act([full, right, left], TEXTS[0], proprio=felt), atol=1e-6)
    said = post(url, {name: value for name, value in payload.items() if name != "state"}, code=400)
    assert said["field"] == "state"
    said = post(url, {**payload, "state": [1.0]}, code=400)
    assert "has shape (1,); 2 finite numbers are wanted" in said["error"]
    said = post(url, {name: value for name, value in payload.items() if name != "left_wrist"}, code=400)
    assert said["error"] == "full_image: 2 views (full_image, right_wrist), the policy looks at 3"


@pytest.mark.parametrize(("actions", "views", "proprio"), [("tokens", 1, False), ("regression", 3, True)])
def test_a_gpu_answers_once_before_anybody_asks(export, monkeypatch, capsys, actions, views, proprio) -> None:
    from fake_gpu import FakeGpu

    from stamo_dist import device
    from stamo_dist.models.openvla.policy import Policy
    from stamo_dist.serve.command import Address, serve

    asked: list[int] = []
    act_batch = Policy.act_batch

    def counted(policy, images, *arguments, **options):
        asked.append(len(images[0]))
        return act_batch(policy, images, *arguments, **options)

    monkeypatch.setattr(Policy, "act_batch", counted)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: sockets[0].close())
    folder = export(actions, views=views, proprio=proprio)
    serve(folder, Address(port=0))
    assert asked == [], "a CPU has nothing to load"
    monkeypatch.setattr(device, "_current", FakeGpu())
    serve(folder, Address(port=0))
    assert asked == [views]
    assert capsys.readouterr().out.count("answers at http://") == 2


def test_the_client_of_the_page_speaks_to_the_command(export) -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "stamo_dist.cli", "serve", str(export("tokens")), "--port", "0"], cwd=ROOT,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert url is not None, said
        assert "it sees 1 view, upright, no crop, and is sent them upright" in server.stdout.readline()
        (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serve.md").read_text(), re.DOTALL)
        code = code.replace("http://127.0.0.1:8777", url[0])
        for _ in range(100):  # it listens from then on, and answers once it runs
            try:
                requests.get(f"{url[0]}/health", timeout=10)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        names: dict = {}
        exec(code, names)
        assert names["action"].shape == (2, 3)
    finally:
        server.terminate()
        server.wait(30)
