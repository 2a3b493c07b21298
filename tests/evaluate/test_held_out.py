"""The figures of merit against numbers worked out by hand, and the mask against pixels known to move."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toy import make_source, toy_frame

from stamo_dist.data.frames import Episodes
from stamo_dist.evaluate.held_out import pick_frames, reference
from stamo_dist.evaluate.metrics import MAX_PSNR, order, psnr, ssim


def test_psnr_is_per_image_and_only_where_asked():
    truth = torch.zeros(2, 3, 16, 16)
    images = truth.clone()
    images[0] += 0.1
    images[1, :, :4] = 0.5  # a quarter of the pixels
    where = torch.zeros(16, 16, dtype=torch.bool)
    where[:4] = True
    assert psnr(images, truth).tolist() == pytest.approx([20.0, -10 * math.log10(0.25 / 4)], abs=1e-4)
    assert psnr(images, truth, where).tolist() == pytest.approx([20.0, -10 * math.log10(0.25)], abs=1e-4)
    assert psnr(truth, truth).tolist() == [MAX_PSNR] * 2
    assert psnr(images, truth, ~where)[1] == MAX_PSNR, "the other pixels are exact"
    assert psnr(images, truth, torch.zeros_like(where)).isnan().all()


def test_ssim_of_a_copy_is_one_and_of_noise_is_low():
    generator = torch.Generator().manual_seed(0)
    truth, noise = torch.rand(2, 3, 32, 32, generator=generator), torch.rand(2, 3, 32, 32, generator=generator)
    assert ssim(truth, truth).tolist() == pytest.approx([1, 1])
    assert ssim(noise, truth).shape == (2,)
    assert (ssim(noise, truth) < 0.2).all()


def test_order_tells_a_steady_path_from_a_wandering_one():
    line = torch.linspace(0, 1, 9)[:, None, None] * torch.ones(9, 2, 4)
    assert order(line) == pytest.approx((1.0, 1.0))
    rank, forward = order(line[[0, 2, 1, 4, 3, 6, 5, 7, 8]])
    assert 0.8 < rank < 1
    assert forward == 5 / 8
    assert all(map(math.isnan, order(torch.ones(9, 2, 4))))


def test_mean_image_and_moving_pixels_come_from_the_training_frames(tmp_path):
    source = make_source(tmp_path, "moves", episodes=3, length=10, size=32)
    train = Episodes(str(source), "train")
    frames = np.stack([train.frames(e, range(10)) for e in range(3)])
    first = sum(map(ord, "moves"))
    drawn = np.stack([[toy_frame(first + e, t, 32) for t in range(10)] for e in range(3)])
    changes = (drawn != drawn[:, :1]).any((0, 1, 4))  # (H, W): what the square ever covers or uncovers

    found = reference(train)
    np.testing.assert_allclose(found.mean.permute(1, 2, 0), frames.reshape(-1, 32, 32, 3).mean(0) / 255, atol=1e-6)
    moving = found.moving.numpy()
    assert moving.sum() == pytest.approx(0.1 * 32 * 32, abs=2)
    assert not (moving & ~changes).any(), "still ground counts as moving"


def test_a_source_where_nothing_moves_has_no_moving_pixels(tmp_path):
    source = make_source(tmp_path, "still", episodes=3, length=1)
    assert not reference(Episodes(str(source), "train")).moving.any()


@pytest.mark.parametrize(("frames", "expected"), [(2, 2), (5, 5), (13, 13), (1000, 60)])
def test_frames_are_spread_over_all_episodes(toy: SimpleNamespace, frames: int, expected: int):
    episodes = Episodes(str(toy.shards / "a"), "val")  # 5 episodes of 12 frames
    picks = pick_frames(episodes, frames)
    assert len(picks) == len({p.sample for p in picks}) == expected
    assert len({p.episode for p in picks}) == min(5, frames)
    assert all(p.sample == 12 * p.episode + p.t for p in picks)
    per_episode = [sum(p.episode == e for p in picks) for e in {p.episode for p in picks}]
    assert max(per_episode) - min(per_episode) <= 1
