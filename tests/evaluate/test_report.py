"""The page is whole in itself: every picture inside, nothing fetched, nothing injected."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from stamo_dist.errors import RunError
from stamo_dist.evaluate.interpolate import Interpolation
from stamo_dist.evaluate.reconstruct import Reconstruction
from stamo_dist.launch.record import Event, record
from stamo_dist.report import page, write_report
from stamo_dist.report.charts import Series, line_chart, ticks
from stamo_dist.report.pictures import embed
from stamo_dist.run.history import sample


def _assert_self_contained(page: str) -> None:
    references = re.findall(r"""(?:src|href|action|data|poster|srcset)\s*=\s*["']([^"']{0,60})""", page)
    assert references
    assert all(r.startswith(("data:image/", "#run")) for r in references), references
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\(", page)


def test_report_holds_every_picture_and_fetches_nothing(run: Path):
    Reconstruction(run, frames=4).evaluate()
    Interpolation(run, episodes=1, points=3).evaluate()
    path = write_report([run])
    assert path == run / "report.html"
    page = path.read_text()
    _assert_self_contained(page)
    pictures = [run / "first_batch.png", *run.glob("eval/*/*.png"), *run.glob("eval/*/*.gif")]
    assert len(pictures) == 1 + 2 + 4
    assert page.count('<img loading="lazy"') == len(pictures)
    shown = [Image.open(io.BytesIO(base64.b64decode(uri))) for uri in re.findall(r'base64,([^"]+)"', page)]
    for picture in pictures:
        assert any(_same(Image.open(picture), one) for one in shown), picture
    row = json.loads((run / "eval/reconstruct/reconstruct.json").read_text())["rows"][1]
    assert f"<td>{row['psnr']:.2f}</td>" in page
    assert page.index("Reconstruction of held-out frames") < page.index("Interpolation of states")
    for said in ("66.7%", "33.3%", "4 of 4", "sampler_steps: 2", "step_00000004", "stamo-dist"):
        assert said in page, said
    assert page.count("<svg") == 6


def _same(written: Image.Image, shown: Image.Image) -> bool:
    """Whether a page shows a picture, all its frames, to within what compression takes of a toy's noise."""
    frames = [[_on_grey(frame) for frame in ImageSequence.Iterator(image)] for image in (written, shown)]
    if len({(len(of), of[0].shape) for of in frames}) > 1:
        return False
    return all(np.abs(a - b).mean() < 8 for a, b in zip(*frames, strict=True))


def _on_grey(frame: Image.Image) -> np.ndarray:
    ground = Image.new("RGBA", frame.size, "grey")
    return np.asarray(Image.alpha_composite(ground, frame.convert("RGBA")).convert("RGB"), float)


def test_pictures_are_compressed_and_animations_stay(run: Path, tmp_path: Path):
    """On pictures as large as those of the demo, and noisier."""
    noise = np.random.default_rng(0).normal(0, 3, (16, 144, 292, 3))
    x, y = np.meshgrid(np.linspace(0, 1, 292), np.linspace(0, 1, 144))
    scene = np.stack([x, y, x * y], -1) * 200 + 20
    frames = [Image.fromarray((scene + n).clip(0, 255).astype(np.uint8)) for n in noise]
    gif, still = tmp_path / "motion.gif", tmp_path / "still.png"
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=160, loop=0)
    frames[0].save(still)
    for path, count in ((gif, 16), (still, 1)):
        shown = embed(path)
        content = base64.b64decode(shown["uri"].partition("base64,")[2])
        with Image.open(io.BytesIO(content)) as image:
            assert (image.format, image.size, getattr(image, "n_frames", 1)) == ("WEBP", (292, 144), count)
            assert count == 1 or (image.info["loop"], image.info.get("duration", 160)) == (0, 160)
        assert len(content) < path.stat().st_size / 2
    tiny = tmp_path / "tiny.png"
    Image.new("L", (2, 2)).save(tiny)
    assert embed(tiny)["uri"].startswith("data:image/")


def test_several_runs_side_by_side(run: Path, tmp_path: Path):
    other = shutil.copytree(run, tmp_path / "other")
    page = write_report([run, other], tmp_path / "out" / "both.html").read_text()
    _assert_self_contained(page)
    assert "2 runs" in page
    assert f"toy ({other})" in page
    assert page.count("<svg") == 2 + 2 * 6


def test_measurements_of_an_earlier_step_are_marked(run: Path, tmp_path: Path):
    Reconstruction(run, frames=4).evaluate()
    other = shutil.copytree(run, tmp_path / "other")
    lines = (other / "metrics.jsonl").read_text().splitlines()
    with (other / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({**json.loads(lines[-1]), "step": 1200}) + "\n")
    said = "of step 4; the run is at 1,200"
    assert "the run is at" not in write_report([run]).read_text()
    assert f"<b>Measured {said}.</b>" in write_report([other]).read_text()
    both = write_report([run, other], tmp_path / "both.html").read_text()
    assert f"toy ({other}), {said}</th>" in both
    assert f"toy ({run})</th>" in both
    assert both.count(f"<b>Measured {said}.</b>") == 1
    result = json.loads((other / "eval/reconstruct/reconstruct.json").read_text())
    result["columns"]["step"] = "step"  # whose rows say it
    result["rows"] = [{**row, "step": 4} for row in result["rows"]]
    (other / "eval/reconstruct/reconstruct.json").write_text(json.dumps(result))
    assert "the run is at" not in write_report([other]).read_text()


def test_a_long_history_is_sampled_and_the_page_says_so(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = shutil.copytree(run, tmp_path / "other")
    with (other / "metrics.jsonl").open("a") as f, (other / "starts.jsonl").open("a") as starts:
        f.write("damaged\n")
        starts.write('{"torn')
    assert "lines of metrics.jsonl that cannot be read and are left out: 1." in write_report([other]).read_text()
    monkeypatch.setattr(page, "read_metrics", partial(sample, wanted=lambda line: "loss" in line, last=2, whole=10))
    found = write_report([other]).read_text()
    assert (
        "the curves and means are of 2 of its lines at equal distances, the curves also of all of its last 2." in found
    )
    assert "4 of 4" in found
    assert found.count("<svg") == 6


def test_a_run_that_has_only_begun_can_be_reported(run: Path):
    (run / "metrics.jsonl").unlink()
    (run / "first_batch.png").unlink()
    (run / "env.json").unlink()
    shutil.rmtree(run / "checkpoints")
    page = write_report([run]).read_text()
    assert "No step was logged yet" in page
    assert "No checkpoint yet" in page
    assert "stamo eval reconstruct" in page


def test_nodes_that_failed(run: Path):
    assert "Failing nodes" not in write_report([run]).read_text()
    off = [Event("failed", blamed=["n2"], cause="it hung"), Event("requeued", avoids=["n2"], reason="stays off <n2>")]
    for event in [Event("submitted"), Event("started", nodes=["n1", "n2"]), *off, Event("requeued", avoids=["n2"])]:
        record(run, event)
    page = write_report([run]).read_text()
    table = page[page.index("Failing nodes") :].partition("</table>")[0]
    assert [re.findall(r"<td[^>]*>([^<]*)", row)[1:] for row in table.split("<tr>")[2:]] == [
        ["n2", "", "it hung"],
        ["", "n2", "stays off &lt;n2&gt;"],
    ]


def test_names_are_escaped_and_damage_is_named(run: Path, tmp_path: Path):
    resolved = run / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace("name: toy", "name: <script>alert(1)</script>"))
    assert "<script" not in write_report([run]).read_text()
    with pytest.raises(RunError, match="not a run folder"):
        write_report([run, tmp_path])
    (run / "eval" / "probe").mkdir(parents=True)
    (run / "eval" / "probe" / "probe.json").write_text('{"rows": [')
    with pytest.raises(RunError, match=r"probe\.json: is damaged"):
        write_report([run])


def test_chart_survives_what_training_logs():
    steps = list(range(1, 5001))
    loss = [1.0 / s for s in steps]
    loss[100], loss[200] = float("nan"), float("inf")
    chart = line_chart([Series("loss", steps, loss)])
    points = re.findall(r'points="([^"]+)"', chart)
    assert len(points) == 2
    assert all(200 < len(p.split()) <= 300 for p in points)
    inside = [tuple(map(float, p.split(","))) for p in points[1].split()]
    assert all(0 <= x <= 400 and 0 <= y <= 210 for x, y in inside)
    assert inside[0][1] < inside[-1][1], "a falling loss goes down the page"
    assert line_chart([Series("empty", [], [])]) == ""
    assert 'class="legend"' in line_chart([Series("<a>", [1], [2.0]), Series("b", [1, 2], [2.0, 2.0])])
    assert "<a>" not in line_chart([Series("<a>", [1], [2.0]), Series("b", [1], [2.0])])
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
