"""Every malformed request is answered with a code of the 400s that names the field; none with 500."""

from __future__ import annotations

import socket
import time

import numpy as np
import pytest

pytest.importorskip("json_numpy", reason="needs the [serve] extra: pip install -e '.[serve]'")
requests = pytest.importorskip("requests", reason="needs the [dev] extra: pip install -e '.[dev]'")

from generated import BODIES  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from speaking import JSON, frames, post  # noqa: E402


@pytest.fixture(scope="module")
def url(regression, served) -> str:
    from stamo_dist.models.policies import load_policy

    return served(load_policy(regression))


GOOD = {"image": np.zeros((8, 8, 3), np.uint8), "instruction": "push the square", "state": [0.0, 1.0]}


def test_what_is_wrong_is_named(url: str) -> None:
    assert post(url, GOOD).shape == (2, 3)
    for field, wrong, said in [
        ("image", {"image": np.zeros((0, 8, 3), np.uint8)}, "has shape (0, 8, 3); 1 to 4096 pixels a side"),
        ("image", {"image": np.zeros((1, 4097, 3), np.uint8)}, "1 to 4096 pixels a side"),
        ("image", {"image": "picture.png"}, "is str; give uint8 (H, W, 3)"),
        ("image", {"image": {"__numpy__": "AAAA", "dtype": "|O", "shape": [3]}}, "an array of dtype |O, not of"),
        ("image", {"image": {"__numpy__": "AAAA", "dtype": "|u1", "shape": [4, 1, 3]}}, "an array of 3 bytes, which"),
        ("image", {"image": {"__numpy__": "?", "dtype": "|u1", "shape": [1]}}, "bytes are not base64"),
        ("instruction", {"instruction": "\ud800"}, "a lone surrogate"),
        ("instruction", {"instruction": "push " * 2000}, "has 10000 bytes; 1000 at most"),
        ("instruction", {"instruction": 3}, "is int; give a text"),
        ("unnorm_key", {"unnorm_key": ["a"]}, "is list; give the name of a source"),
        ("unnorm_key", {"unnorm_key": {}}, "is dict; give"),
        ("unnorm_key", {"unnorm_key": 0}, "is int; give"),
        ("state[1]", {"state": np.array([0, np.nan])}, "is NaN; give finite numbers"),
        ("state[0]", {"state": [float("inf"), 1]}, "is infinite; give finite numbers"),
        ("state", {"state": [10**400, 1]}, "is not an array of numbers"),
        ("state", {"state": [None, 1]}, "is not an array of numbers"),
        ("state", {"state": float("nan")}, "is NaN; 2 numbers are wanted"),
        ("observations", {"observations": [GOOD] * 33}, "has 33; give a list of 1 to 32 observations"),
    ]:
        answer = post(url, {**GOOD, **wrong}, code=400)
        assert answer["field"] == field, answer
        assert said in answer["error"], answer
    for text, said in [
        ('{"a":' * 100_000, "is nested too deeply"),
        ("[1]", "is list, not a map"),
        ("9" * 5000, "is not JSON"),
        ("", "is not JSON"),
    ]:
        found = requests.post(f"{url}/act", data=text, headers=JSON, timeout=30)
        assert (found.status_code, found.json()["field"]) == (400, "body")
        assert said in found.json()["error"]


def test_the_longest_instruction_and_the_greatest_image_are_answered(url: str) -> None:
    picture = np.zeros((4096, 1, 3), np.uint8)
    assert post(url, {**GOOD, "image": picture, "instruction": "push " * 200}).shape == (2, 3)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(body=BODIES)
def test_no_request_is_the_server_s_fault(url: str, body: bytes) -> None:
    answer = requests.post(f"{url}/act", data=body, headers=JSON, timeout=60)
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        assert answer.json()["field"], answer.text


def test_bodies_are_limited(regression, served) -> None:
    from stamo_dist.models.policies import load_policy
    from stamo_dist.serve.limits import Limits

    url = served(load_policy(regression), limits=Limits(body=5000, decoded=400, body_s=0.5, headers_s=0.5))
    assert post(url, GOOD).shape == (2, 3)
    assert "take 0 MiB at most" in post(url, {**GOOD, "image": frames(1, 16)[0]}, code=400)["error"]
    assert post(url, {**GOOD, "image": frames(1, 64)[0]}, code=413)["field"] == "body"
    chunked = requests.post(f"{url}/act", data=iter([b"{" * 3000] * 3), headers=JSON, timeout=30)
    assert chunked.status_code == 413
    assert requests.post(f"{url}/act", data="{}", timeout=30).json()["field"] == "Content-Type"

    place = url.removeprefix("http://")
    head = f"POST /act HTTP/1.1\r\nHost: {place}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
    for sent, expected in [(f"{head}\r\n{{", b"408"), (head, b""), ("", b"")]:
        with socket.create_connection(place.split(":"), timeout=20) as slow:
            slow.sendall(sent.encode())
            start = time.monotonic()
            while not expected and time.monotonic() - start < 10:  # a byte now and then does not help
                try:
                    slow.sendall(b"X" if sent else b"P")
                except OSError:
                    break
                time.sleep(0.1)
            found = slow.recv(4096) if expected else b""
            assert expected in found
            assert time.monotonic() - start < 10
    assert post(url, GOOD).shape == (2, 3)
