"""Noise is a function of (seed, step, sample) and of nothing else."""

from __future__ import annotations

import torch

from stamo_dist.tasks.noise import Noise, philox


def words(*values: int) -> list[torch.Tensor]:
    return [torch.tensor([v], dtype=torch.int64) for v in values]


def test_philox_known_answers():
    """The test vectors that the authors of Philox publish with Random123."""
    assert [int(w) for w in philox(words(0, 0, 0, 0), (0, 0))] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert [int(w) for w in philox(words(ones, ones, ones, ones), (ones, ones))] == [
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    ]  # fmt: skip


def test_a_sample_sees_the_same_noise_in_any_batch():
    noise = Noise(7).at(12)
    samples = torch.tensor([5, 2**40 + 1, 99, 0])
    together = noise.normal(samples, (3, 4, 4))
    for i, s in enumerate(samples):
        assert torch.equal(noise.normal(s[None], (3, 4, 4))[0], together[i])
    assert torch.equal(noise.uniform(samples.flip(0)), noise.uniform(samples).flip(0))


def test_draws_differ_by_seed_step_sample_and_stream():
    s = torch.tensor([3, 4])
    base = Noise(1).at(1).normal(s, (64,))
    others = [
        Noise(2).at(1).normal(s, (64,)), Noise(1).at(2).normal(s, (64,)), Noise(1).at(1).normal(s, (64,), stream=2),
        Noise(1).at(1).normal(s + 2**32, (64,)), base.flip(0),
    ]  # fmt: skip
    for other in others:
        assert (base - other).abs().min(dim=1).values.max() > 0
        assert abs(torch.corrcoef(torch.stack([base[0], other[0]]))[0, 1]) < 0.5


def test_distribution():
    samples = torch.arange(4000)
    z = Noise(0).at(1).normal(samples, (32,)).flatten().double()
    assert abs(z.mean()) < 0.01
    assert abs(z.var() - 1) < 0.02
    assert abs((z**4).mean() - 3) < 0.1
    u = Noise(0).at(1).uniform(samples).double()
    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.02
