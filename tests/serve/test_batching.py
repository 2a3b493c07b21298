"""Requests that wait are computed together, and each gets its own answer or its own error."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

pytest.importorskip("json_numpy", reason="needs the [serve] extra: pip install -e '.[serve]'")
pytest.importorskip("uvicorn", reason="needs the [serve] extra: pip install -e '.[serve]'")

from speaking import frames, post

from stamo_dist.errors import DataError


class Held:
    """A policy that waits in its first computation, notes how much it computes at once, and refuses one instruction."""

    def __init__(self, policy: Any, monkeypatch: pytest.MonkeyPatch):
        self.sizes: list[int] = []
        self.begun, self.go = threading.Event(), threading.Event()
        act = type(policy).act_batch

        def act_batch(policy: Any, images: Any, instructions: Any, **options: Any) -> np.ndarray:
            self.sizes.append(len(images))
            self.begun.set()
            assert self.go.wait(60)
            if "refuse me" in instructions:
                raise DataError("refused")
            found: np.ndarray = act(policy, images, instructions, **options)
            return found

        monkeypatch.setattr(type(policy), "act_batch", act_batch)


@pytest.fixture
def ask(regression, served, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Ask all at once while the policy computes the first; gives the answers, and the sizes of what was computed."""
    from stamo_dist.models.policies import load_policy
    from stamo_dist.serve.limits import Limits

    policy = load_policy(regression)

    def together(payloads: list[dict[str, Any]], codes: list[int], most: int = 16) -> tuple[list[Any], list[int]]:
        with monkeypatch.context() as patched:
            held = Held(policy, patched)
            url = served(policy, limits=Limits(batch=most))
            with ThreadPoolExecutor(len(payloads)) as pool:
                first = pool.submit(post, url, payloads[0], codes[0])
                assert held.begun.wait(60)
                rest = [pool.submit(post, url, p, c) for p, c in zip(payloads[1:], codes[1:], strict=True)]
                threading.Event().wait(1.0)  # until all of them wait
                held.go.set()
                return [one.result(60) for one in [first, *rest]], held.sizes

    return together


def moments(count: int) -> list[dict[str, Any]]:
    states = np.random.default_rng(1).uniform(0, 10, (count, 2))
    return [
        {"image": frame, "instruction": f"push {i}", "state": state}
        for i, (frame, state) in enumerate(zip(frames(count), states, strict=True))
    ]


def test_those_that_wait_are_computed_together(ask, regression) -> None:
    from stamo_dist.models.policies import load_policy

    policy, asked = load_policy(regression), moments(6)
    answers, sizes = ask(asked, [200] * 6)
    assert sizes == [1, 5]
    for moment, answer in zip(asked, answers, strict=True):
        alone = policy.act(moment["image"], moment["instruction"], proprio=moment["state"])
        assert np.allclose(answer, alone, atol=1e-5)


def test_at_most_so_many(ask) -> None:
    asked = moments(8)
    many = {"observations": asked[:5]}
    _, sizes = ask([asked[0], *asked[1:6], many], [200] * 7, most=3)
    assert max(sizes) == 3
    assert sum(sizes) == 1 + 5 + 5


def test_an_error_is_of_its_own_request(ask) -> None:
    asked = moments(5)
    asked[2]["instruction"] = "refuse me"
    answers, sizes = ask(asked, [200, 200, 400, 200, 200])
    assert answers[2]["error"] == "refused"
    assert [np.shape(a) for i, a in enumerate(answers) if i != 2] == [(2, 3)] * 4
    assert sorted(sizes) == [1, 1, 1, 1, 1, 4]


def test_images_of_other_sizes_are_computed_apart(ask) -> None:
    asked = moments(4)
    asked[1]["image"] = frames(1, 48)[0]
    answers, sizes = ask(asked, [200] * 4)
    assert sorted(sizes) == [1, 1, 2]
    assert [np.shape(a) for a in answers] == [(2, 3)] * 4
