"""Requests that no client would send, and some that one would; the strategies of the property tests."""

from __future__ import annotations

import base64
import json
from typing import Any

import json_numpy
import numpy as np
from hypothesis import strategies as st

#: What Python writes as text and no UTF-8 can hold, too.
TEXTS = st.text(st.characters(codec=None, exclude_categories=()), max_size=40) | st.sampled_from(
    ["", " ", "\ud800", "a", "push the square", "x" * 1001, "é" * 501, "\0", "a" * 100_000]
)
NUMBERS = st.integers() | st.floats(width=64) | st.booleans() | st.sampled_from([10**400, -(10**25), 1 << 63])
DTYPES = st.sampled_from(
    ["|u1", "<u1", ">u2", "<f8", "<f4", "|O", "O", "<U4", "|S3", "<M8[s]", "|V8", "c16", "x", "", "V99999999999",
     "(2,)u1", [["a", "<f8"]], None, 3, {}]
)  # fmt: skip
SHAPES = st.lists(st.integers(-2, 40) | st.sampled_from([0, 3, 1 << 40, 10**30, True]), max_size=10) | st.sampled_from(
    [None, 3, "3", [[3]], [1.5], [0, 4, 3], [4, 0, 3], [4, 4, 3], [2], []]
)
#: What claims to be an array.
CLAIMS = st.fixed_dictionaries(
    {"__numpy__": st.binary(max_size=64).map(lambda b: base64.b64encode(b).decode()) | TEXTS | NUMBERS},
    optional={"dtype": DTYPES, "shape": SHAPES},
)
ARRAYS = st.sampled_from(
    [
        np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 0, 3), np.uint8),
        np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros(2),
        np.zeros(3), np.array([np.nan, 0]), np.array([0, np.inf]), np.zeros((2, 1)), np.zeros(()), np.zeros(2, bool),
        np.zeros((1, 5000, 3), np.uint8), np.zeros((7, 1, 3), np.uint8),
    ]
)  # fmt: skip
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | NUMBERS | TEXTS | CLAIMS | ARRAYS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
IMAGE = st.just(np.full((8, 8, 3), 7, np.uint8))
STATE = st.just(np.zeros(2)) | st.just([0.5, 1])


def mostly(right: st.SearchStrategy[Any], wrong: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Six of seven are right, so that what lies behind a field's check is reached, too."""
    return st.sampled_from([right] * 6 + [wrong]).flatmap(lambda chosen: chosen)


def observations(image: str = "image", text: str = "instruction", state: str = "state") -> st.SearchStrategy[Any]:
    """Observations of which every field is mostly right and mostly there."""
    wanted = {
        image: mostly(IMAGE, ANYTHING),
        text: mostly(st.just("push the square"), TEXTS | ANYTHING),
        state: mostly(STATE, ANYTHING),
    }
    more = {
        "unnorm_key": mostly(st.sampled_from([None, "a"]), st.just("b") | ANYTHING),
        "full_image": IMAGE | ANYTHING,
        "left_wrist": IMAGE | ANYTHING,
        "proprio": mostly(STATE, ANYTHING),
    }
    return mostly(st.fixed_dictionaries(wanted, optional=more), st.fixed_dictionaries({}, optional={**wanted, **more}))


REQUESTS = (
    observations()
    | observations()
    | st.fixed_dictionaries({"observations": st.lists(observations(), max_size=4) | ANYTHING})
    | observations().map(lambda given: {"encoded": json_numpy.dumps(given)})
    | st.fixed_dictionaries({"encoded": ANYTHING})
    | ANYTHING
)
#: Bodies that are nearly JSON.
BODIES = (
    REQUESTS.map(lambda given: json_numpy.dumps(given).encode())
    | REQUESTS.map(lambda given: json_numpy.dumps(given).encode())
    | st.binary(max_size=200)
    | st.sampled_from(["[", '{"a":', '{"observations": [', '{"encoded": [']).flatmap(
        lambda opening: st.integers(1, 100_000).map(lambda depth: (opening * depth).encode())
    )
    | st.sampled_from(
        [b"", b"null", b"NaN", b"9" * 5000, b'{"image": ' + b"9" * 5000 + b"}", b"\xff\xfe{", b'{"state": [NaN]}',
         json.dumps({"observations": [{}] * 50_000}).encode()]
    )
)  # fmt: skip
