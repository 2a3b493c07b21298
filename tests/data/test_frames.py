"""Episodes by number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from made import colour, write_source

from stamo_dist.data.frames import Episodes
from stamo_dist.errors import DataError


def test_frames_and_actions_of_an_episode(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "s", cameras=("front", "wrist"), splits=("train", "heldout"))
    episodes = Episodes(str(folder), "heldout", "wrist")
    assert [e.length for e in episodes.episodes] == [7, 12, 5, 9]
    for e in range(len(episodes)):
        ts = range(episodes.episodes[e].length)
        frames = episodes.frames(e, ts)
        assert frames.shape == (len(ts), 32, 32, 3)
        expected = np.stack([colour("s", "wrist", e, t) for t in ts])[:, None, None]
        assert np.abs(frames.astype(int) - expected.astype(int)).max() <= 3
        assert episodes.actions(e).tolist() == [[e, t] for t in ts]
    assert episodes.actions(1, [3, 0]).tolist() == [[1, 3], [1, 0]]
    assert episodes.proprio(2, [4]).tolist() == [[4]]
    with pytest.raises(DataError, match="episode s-0 has frames 0 to 6, not 7"):
        episodes.frames(0, [7])
    with pytest.raises(DataError, match="has no split 'test', only train, heldout"):
        Episodes(str(folder), "test")
