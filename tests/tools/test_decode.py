"""Frames of videos by their presentation times, on files written by FFmpeg's own encoders."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from films import cut, film, number, picture

from data_tools.formats.decode import probe, video_frames
from stamo_dist.errors import DataError

KINDS = [
    ("a.mp4", "libx264", 2),
    ("a.mkv", "libx264", 2),
    ("a.avi", "libx264", 2),
    ("a.webm", "libvpx-vp9", 0),
    ("a.webm", "libvpx", 0),
    ("a.mp4", "libsvtav1", 0),
    ("a.avi", "mpeg4", 0),
    ("a.avi", "mpeg4", 2),
]


@pytest.mark.parametrize(("name", "codec", "b_frames"), KINDS)
def test_every_frame_at_its_time(tmp_path: Path, name: str, codec: str, b_frames: int) -> None:
    path = film(tmp_path / name, 40, codec=codec, b_frames=b_frames)
    times, frames = video_frames(path)
    np.testing.assert_allclose(times, np.arange(40) / 30, atol=1e-3)
    assert [number(image) for image in frames(range(40))] == list(range(40))
    info = probe(path)
    assert (info.frames, info.width, info.height) == (40, 64, 64)
    assert info.rate_hz == pytest.approx(30, rel=0.01)

    times, frames = video_frames(path, 0.5, 1.0)
    np.testing.assert_allclose(times, np.arange(15, 30) / 30, atol=1e-3)
    assert [number(image) for image in frames([0, 3, 3, 14])] == [15, 18, 18, 29]
    assert [number(image) for image in frames([12])] == [27]


@pytest.mark.parametrize("name", ["human_video", "lerobot_v3_libero/videos/observation.images.wrist"])
def test_real_videos_equal_a_plain_sequential_decode(name: str, sample_data: Callable[[str], Path]) -> None:
    """Also box.mp4, which has B-frames but lost their presentation times."""
    for path in sample_data(name).rglob("*.mp4"):
        times, frames = video_frames(path)
        wanted = [0, 1, 2, 40, 41, 90, 200, 203]
        with av.open(str(path)) as container:
            rate = float(container.streams.video[0].average_rate or 0)
            plain = dict(zip(range(204), container.decode(video=0), strict=False))
        for mine, n in zip(frames(wanted), wanted, strict=True):
            np.testing.assert_array_equal(mine, plain[n].to_ndarray(format="rgb24"), err_msg=f"{path} {n}")
        np.testing.assert_allclose(np.diff(times), 1 / rate, rtol=0.05)
        part, frames = video_frames(path, float(times[100]), float(times[110]))
        np.testing.assert_allclose(part, times[100:110])
        np.testing.assert_array_equal(next(iter(frames([7]))), plain[107].to_ndarray(format="rgb24"))


def test_variable_frame_rate(tmp_path: Path) -> None:
    shown = np.cumsum([0, *[0.033, 0.1, 0.05, 0.4, 0.033] * 6])
    for name, codec in (("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")):
        path = film(tmp_path / name, len(shown), codec=codec, times=shown.tolist())
        times, _ = video_frames(path)
        np.testing.assert_allclose(times, shown, atol=1e-3)
        inside = np.flatnonzero((shown >= 1.0) & (shown < 2.0))
        times, frames = video_frames(path, 1.0, 2.0)
        np.testing.assert_allclose(times, shown[inside], atol=1e-3)
        assert [number(image) for image in frames(range(len(times)))] == inside.tolist()
        assert probe(path).rate_hz == pytest.approx(len(shown) / (shown[-1] + 0.05), rel=0.05)


@pytest.mark.parametrize("rotation", [(0, False, False), (90, False, False), (180, False, False), (-90, False, False),
                                      (0, True, False), (90, False, True)])  # fmt: skip
def test_frames_are_turned_as_the_display_matrix_says(tmp_path: Path, rotation: tuple[float, bool, bool]) -> None:
    """A phone held sideways stores its pictures lying, with a matrix that sets them up."""
    degrees, across, upside = rotation
    lying = []
    for n in range(5):
        image = picture(n)[:, ::-1] if across else picture(n)  # undo in the opposite order
        image = image[::-1] if upside else image
        lying.append(np.rot90(image, -round(degrees / 90)))
    _, frames = video_frames(film(tmp_path / "a.mp4", lying, rotation=rotation))
    assert [number(image) for image in frames(range(5))] == list(range(5))


def test_a_damaged_part_is_named_and_frames_beyond_it_are_reached_without_it(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", 60, gop=10)
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    for packet in packets[20:30]:
        assert packet.pos is not None
        data[packet.pos + 5 : packet.pos + packet.size] = bytes([0x55]) * (packet.size - 5)
    path.write_bytes(data)
    _, frames = video_frames(path)
    assert [number(image) for image in frames([5, 45])] == [5, 45]
    with pytest.raises(
        DataError, match=r"a\.mp4: (the decoder gave 2\d of 60 frames; the one at|truncated or corrupt)"
    ):
        list(frames(range(60)))


def headless(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        out.start_encoding()
    return path


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def junk(path: Path) -> Path:
    path.write_bytes(b"hello" * 1000)
    return path


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "index lost": (lambda p: cut(film(p / "a.mp4"), 0.5), r"a\.mp4: truncated or corrupt video"),
    "end lost": (
        lambda p: cut(film(p / "a.mp4", container_options={"movflags": "faststart"}), 0.9),
        r"a\.mp4: truncated",
    ),
    "webm": (lambda p: cut(film(p / "a.webm", codec="libvpx-vp9"), 0.5), r"a\.webm: truncated: its frames end at"),
    "avi": (lambda p: cut(film(p / "a.avi", codec="mpeg4"), 0.5), r"a\.avi: truncated"),
    "no frames": (lambda p: headless(p / "a.mp4"), r"a\.mp4: (has no video stream|no video frame)"),
    "sound only": (lambda p: sound(p / "a.mp4"), r"a\.mp4: has no video stream"),
    "junk": (lambda p: junk(p / "a.mp4"), r"a\.mp4: truncated or corrupt video"),
    "missing": (lambda p: p / "a.mp4", r"a\.mp4: no such video file"),
}


@pytest.mark.parametrize("how", BAD)
def test_unusable_files_are_refused(tmp_path: Path, how: str) -> None:
    make, message = BAD[how]
    path = make(tmp_path)
    with pytest.raises(DataError, match=message):
        video_frames(path)


def test_no_frame_in_the_part_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.mp4: no video frame between 7 s and 9 s"):
        video_frames(film(tmp_path / "a.mp4"), 7.0, 9.0)


def _drop(frames: object, path: Path) -> None:
    del frames
    _, again = video_frames(path)
    assert number(next(iter(again([3])))) == 3


def test_a_decoder_left_open_does_not_hang_a_forked_worker(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4")
    _, frames = video_frames(path)
    half_way = iter(frames(range(40)))
    next(half_way)
    worker = multiprocessing.get_context("fork").Process(target=_drop, args=(half_way, path))
    worker.start()
    worker.join(30)
    assert worker.exitcode == 0
    assert number(next(half_way)) == 1
