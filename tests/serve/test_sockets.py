"""Websockets speak openpi's and vla-eval's messages; what is malformed is an answer, not the end of the server."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

pytest.importorskip("json_numpy", reason="needs the [serve] extra: pip install -e '.[serve]'")
msgpack = pytest.importorskip("msgpack", reason="needs the [serve] extra: pip install -e '.[serve]'")
websockets = pytest.importorskip("websockets", reason="needs the [serve] extra: pip install -e '.[serve]'")

from generated import ANYTHING, observations  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402
from speaking import frames  # noqa: E402
from websockets.exceptions import InvalidStatus  # noqa: E402
from websockets.sync.client import ClientConnection, connect  # noqa: E402


def openpi_array(value: Any) -> Any:
    """As openpi_client.msgpack_numpy.pack_array."""
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def openpi_value(found: dict) -> Any:
    if b"__ndarray__" in found:
        return np.ndarray(buffer=found[b"data"], dtype=np.dtype(found[b"dtype"]), shape=found[b"shape"])
    return found


def vla_eval_array(value: Any) -> Any:
    """As vla_eval.protocol.numpy_codec.encode_ndarray, which sends images as PNG."""
    if value.dtype == np.uint8 and value.ndim == 3:
        buffer = io.BytesIO()
        Image.fromarray(value).save(buffer, format="PNG")
        return {"__image__": True, "format": "png", "data": buffer.getvalue(), "shape": list(value.shape)}
    return {"__ndarray__": True, "data": value.tobytes(), "dtype": value.dtype.str, "shape": list(value.shape)}


def vla_eval_value(found: dict) -> Any:
    if "__ndarray__" in found:
        return np.frombuffer(found["data"], np.dtype(found["dtype"])).reshape(found["shape"])
    return found


@contextmanager
def opened(url: str, path: str = "/", **options: Any) -> Iterator[ClientConnection]:
    with connect(url.replace("http", "ws") + path, compression=None, **options) as socket:
        yield socket


def ask_openpi(socket: ClientConnection, observation: Any) -> Any:
    socket.send(msgpack.packb(observation, default=openpi_array))
    answer = socket.recv(timeout=30)
    return answer if isinstance(answer, str) else msgpack.unpackb(answer, object_hook=openpi_value)


def tell(socket: ClientConnection, kind: str, payload: Any, seq: int = 0) -> None:
    message = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    socket.send(msgpack.packb(message, default=vla_eval_array, use_bin_type=True))


def hear(socket: ClientConnection) -> dict[str, Any]:
    found: dict[str, Any] = msgpack.unpackb(socket.recv(timeout=30), object_hook=vla_eval_value)
    return found


def test_openpi(export: Callable, served) -> None:
    from stamo_dist.models.policies import load_policy

    policy = load_policy(export("regression", views=2, proprio=True))
    scene, hand = frames(2)
    felt = np.array([1.0, 2.0])
    expected = policy.act([scene, hand], "move it", proprio=felt)
    with opened(served(policy)) as socket:
        about = msgpack.unpackb(socket.recv(timeout=30))
        assert (about["policy"], about["views"], about["chunk"], about["unnorm_keys"]) == ("toy", 2, 2, ["a"])
        libero = {"observation/wrist_image": hand, "observation/image": scene, "observation/state": felt,
                  "prompt": "move it"}  # fmt: skip
        found = ask_openpi(socket, libero)
        assert np.allclose(found["actions"], expected, atol=1e-6)
        assert found["server_timing"]["infer_ms"] > 0
        droid = {"observation/exterior_image_1_left": scene, "observation/wrist_image_left": hand, "prompt": "move it",
                 "observation/joint_position": felt[:1], "observation/gripper_position": felt[1:]}  # fmt: skip
        assert np.allclose(ask_openpi(socket, droid)["actions"], expected, atol=1e-6)
        aloha = {"images": {"cam_high": scene.transpose(2, 0, 1), "cam_left_wrist": hand.transpose(2, 0, 1)},
                 "state": felt, "prompt": "move it"}  # fmt: skip
        assert np.allclose(ask_openpi(socket, aloha)["actions"], expected, atol=1e-6)
        for wrong, said in [
            ({**libero, "prompt": ""}, "prompt: is missing"),
            ({**libero, "observation/state": np.array([np.nan, 0])}, "observation/state[0]: is NaN"),
            ({**libero, "observation/image": scene[:0]}, "observation/image: has shape (0, 32, 3)"),
            ({**libero, "observation/image": msgpack.ExtType(5, b"x")}, "observation/image: is an extension type"),
            ({**libero, "observation/image": {b"__ndarray__": True, b"data": b"x", b"dtype": "|O", b"shape": []}},
             "observation/image: is an array of dtype |O"),
            ({"images": {"cam_high": scene}, "prompt": "x"}, "1 views (images.cam_high), the policy looks at 2"),
            ([], "message: is list, not a map"),
        ]:  # fmt: skip
            answer = ask_openpi(socket, wrong)
            assert isinstance(answer, str)
            assert said in answer
        assert np.allclose(ask_openpi(socket, libero)["actions"], expected, atol=1e-6)


def test_views_in_the_order_of_training(export: Callable, served) -> None:
    from stamo_dist.models.policies import load_policy

    policy = load_policy(export("regression", views=2))
    assert policy.statistics.seen["a"].cameras == ("camera_0", "camera_1")
    a, b = frames(2)
    with opened(served(policy)) as socket:
        socket.recv(timeout=30)
        found = ask_openpi(socket, {"images": {"camera_1": b, "camera_0": a}, "prompt": "move it"})
    assert np.allclose(found["actions"], policy.act([a, b], "move it"), atol=1e-6)


def test_vla_eval(regression, served) -> None:
    from stamo_dist.models.policies import load_policy

    policy = load_policy(regression)
    first, second = frames(2)
    felt = np.array([1.0, 2.0])
    expected = policy.act(first, "move it", proprio=felt)
    with opened(served(policy), "/vla-eval") as socket:
        tell(socket, "hello", {"harness_version": "0.8.0", "protocol_version": 1}, 1)
        hello = hear(socket)
        assert (hello["type"], hello["seq"], hello["payload"]["protocol_version"]) == ("hello", 1, 1)
        assert hello["payload"]["observation_params"] == {"send_state": True}
        tell(socket, "episode_start", {"task": {"name": "x"}}, 2)
        seen = {"images": {"agentview": first, "wrist": second}, "task_description": "move it", "states": felt}
        for step in range(2):  # both actions of the chunk, of what was seen first
            tell(socket, "observation", seen if step == 0 else {**seen, "images": {"agentview": second}}, 3 + step)
            answer = hear(socket)
            assert (answer["type"], answer["seq"]) == ("action", 3 + step)
            assert np.allclose(answer["payload"]["actions"], expected[step], atol=1e-6)
        tell(socket, "observation", seen, 5)
        hear(socket)
        tell(socket, "episode_end", {}, 6)
        tell(socket, "episode_start", {}, 7)
        tell(socket, "observation", seen, 8)  # a new episode begins with a new chunk
        assert np.allclose(hear(socket)["payload"]["actions"], expected[0], atol=1e-6)
        for kind, payload, said in [
            ("observation", {**seen, "states": [1.0]}, "states: has shape (1,); 2 finite numbers are wanted"),
            ("observation", {**seen, "images": 3}, "images: is int; give a map"),
            ("observation", {"task_description": "x"}, "images: is missing"),
            ("observation", [], "payload: is list, not a map"),
            ("config", {}, "type: is not hello"),
        ]:
            tell(socket, kind, payload, 9)
            answer = hear(socket)
            assert (answer["type"], answer["seq"]) == ("error", 9)
            assert said in answer["payload"]["error"]


def test_vla_eval_is_given_its_gripper(regression, served) -> None:
    from stamo_dist.models.policies import load_policy

    policy = load_policy(regression)
    (frame,) = frames(1)
    expected = policy.act(frame, "move it", proprio=np.zeros(2))[0]
    with opened(served(policy, actions="openvla"), "/vla-eval") as socket:
        tell(socket, "observation", {"images": {"a": frame}, "task_description": "move it", "state": np.zeros(2)})
        found = hear(socket)["payload"]["actions"]
    assert np.allclose(found[:-1], expected[:-1], atol=1e-6)
    assert found[-1] == -np.sign(2 * expected[-1] - 1)


def test_bombs(regression, served) -> None:
    """Small messages that would take much memory."""
    from stamo_dist.models.policies import load_policy

    big = io.BytesIO()
    Image.new("RGB", (5000, 5000)).save(big, format="PNG")
    wide = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(wide, format="PNG")
    with opened(served(load_policy(regression)), "/vla-eval") as socket:
        for images, said in [
            ([big], "an image of 5000 × 5000; 4096 a side at most"),
            ([wide] * 4, "those of a request take 128 MiB at most"),
            ([io.BytesIO(b"GIF89a")], "an image that cannot be decoded"),
        ]:
            found = {str(i): {"__image__": True, "format": "png", "data": p.getvalue()} for i, p in enumerate(images)}
            tell(socket, "observation", {"images": found, "task_description": "x"})
            assert said in hear(socket)["payload"]["error"]
        for data in (b"\xdd\xff\xff\xff\xff", b"\x91" * 5000 + b"\x90", b"\xc1", b""):
            socket.send(data)
            assert hear(socket)["payload"]["error"].startswith("message: ")


def test_who_may_connect(regression, served) -> None:
    from stamo_dist.models.policies import load_policy
    from stamo_dist.serve.guard import Allowed
    from stamo_dist.serve.limits import Limits

    url = served(
        load_policy(regression), allowed=Allowed.on("127.0.0.1", token="s3cret"), limits=Limits(idle_s=0.5, body=1000)
    )
    for headers, code in [({}, 401), ({"Authorization": "Api-Key s3cret", "Origin": "https://evil.example"}, 403)]:
        with pytest.raises(InvalidStatus) as refused, opened(url, additional_headers=headers):
            pass
        assert refused.value.response.status_code == code
    with opened(url.replace("://", "://:s3cret@"), "/vla-eval") as socket:
        tell(socket, "hello", {})
        assert hear(socket)["type"] == "hello"
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            socket.recv(timeout=30)
        assert closed.value.rcvd.code == 1001
    with opened(url, additional_headers={"Authorization": "Api-Key s3cret"}) as socket:
        socket.recv(timeout=30)
        socket.send(b"x" * 2000)
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            socket.recv(timeout=30)
        assert closed.value.rcvd.code == 1009


def packed(value: Any) -> bytes:
    """Msgpack of whatever has one."""
    try:
        return msgpack.packb(value, default=openpi_array, unicode_errors="surrogatepass")
    except (AttributeError, OverflowError, ValueError):  # integers beyond 64 bits
        return b"\xc1"


def by_camera(seen: dict) -> dict:
    """With a map of images where there is one image."""
    return {**seen, "images": {"agentview": seen["images"]}} if isinstance(seen.get("images"), np.ndarray) else seen


OPENPI = observations("observation/image", "prompt", "observation/state").map(packed)
VLA_EVAL = st.fixed_dictionaries(
    {"type": st.sampled_from(["observation", "observation", "hello", "x"]) | ANYTHING,
     "payload": observations("images", "task_description", "states").map(by_camera) | ANYTHING},
    optional={"seq": ANYTHING, "timestamp": ANYTHING},
).map(packed)  # fmt: skip


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(openpi=OPENPI | st.binary(max_size=100), vla_eval=VLA_EVAL | st.binary(max_size=100))
def test_no_message_ends_a_connection(connections, openpi: bytes, vla_eval: bytes) -> None:
    for socket, message in zip(connections, (openpi, vla_eval), strict=True):
        socket.send(message)
        socket.recv(timeout=30)


@pytest.fixture(scope="module")
def connections(regression, served) -> Iterator[tuple[ClientConnection, ClientConnection]]:
    from stamo_dist.models.policies import load_policy

    url = served(load_policy(regression))
    with opened(url) as openpi, opened(url, "/vla-eval") as vla_eval:
        openpi.recv(timeout=30)
        yield openpi, vla_eval
