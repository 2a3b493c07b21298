"""What tests of the server say to it."""

from __future__ import annotations

import json_numpy
import numpy as np
import requests

JSON = {"Content-Type": "application/json"}


def frames(count: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def post(url: str, payload: object, code: int = 200):
    answer = requests.post(f"{url}/act", data=json_numpy.dumps(payload), headers=JSON, timeout=30)
    assert answer.status_code == code, answer.text
    return json_numpy.loads(answer.text)
