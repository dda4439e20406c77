from collections import Counter

import numpy as np
import pytest

from gift_lightning.order import MicroBatch, MicroBatches, Sequential
from gift_lightning.seeds import keyed_seed


def lengths_of(n):
    return np.random.default_rng(n).integers(1, 40, size=n)


def sampler(n=23, **options):
    lengths = lengths_of(n)
    return MicroBatches(np.arange(n), lengths, lengths - 1, **options)


def windows(n, size, seed, epoch):
    return sampler(n, batch_size=size, seed=seed).windows(epoch)


def test_keyed_seed_is_fixed_and_distinct():
    # Pinned: a change of these values changes the data order of every run.
    assert keyed_seed(0, "order", 0) == 822864071684415769
    assert keyed_seed(0, "order", 0) < 2**63
    seeds = {keyed_seed(s, p, k) for s in range(3) for p in ("a", "b") for k in range(3)}
    assert len(seeds) == 18


def test_windows_cover_everything_and_keep_the_short_last_one():
    parts = windows(10, 4, seed=1, epoch=0)
    assert [len(part) for part in parts] == [4, 4, 2]
    assert sorted(np.concatenate(parts).tolist()) == list(range(10))
    assert not np.array_equal(np.concatenate(parts), np.concatenate(windows(10, 4, 1, 1)))
    assert np.array_equal(np.concatenate(parts), np.concatenate(windows(10, 5, 1, 0)))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 5, 12, 23])
def test_each_sample_once_per_epoch(n, world, accumulate):
    ranks = [
        sampler(n, batch_size=2, accumulate=accumulate, world=world, rank=rank, seed=7)
        for rank in range(world)
    ]
    for epoch in range(3):
        seen = Counter()
        for rank in ranks:
            rank.set_epoch(epoch)
        for micro_batches in zip(*ranks, strict=True):  # the same number on every rank
            assert len({(m.step_tokens, m.step_sequences) for m in micro_batches}) == 1
            assert all(len(m.sample_ids) <= 2 for m in micro_batches)
            assert any(m.sample_ids for m in micro_batches)
            for m in micro_batches:
                seen.update(m.sample_ids)
        assert seen == Counter(range(n))
    assert all(len(rank) == len(list(rank)) for rank in ranks)


def test_a_window_is_the_same_for_any_world_size():
    def steps(world, batch_size, accumulate):
        content = Counter()
        lengths = lengths_of(23)
        for rank in range(world):
            order = sampler(
                batch_size=batch_size, accumulate=accumulate, world=world, rank=rank, seed=3
            )
            for i, m in enumerate(order):
                for sample in m.sample_ids:
                    content[i // accumulate, sample] += 1
            full = order.windows(0)
        for i, window in enumerate(full):
            assert {s for j, s in content if j == i} == set(window.tolist())
            mine = [m for j, m in enumerate(order) if j // accumulate == i]
            assert {m.step_tokens for m in mine} == {int((lengths - 1)[window].sum())}
            assert {m.step_sequences for m in mine} == {len(window)}
        return content

    expected = steps(1, 6, 1)
    for world, batch_size, accumulate in [(1, 2, 3), (2, 3, 1), (3, 2, 1), (3, 1, 2), (1, 1, 6)]:
        assert steps(world, batch_size, accumulate) == expected


def test_longest_samples_come_first_in_a_window():
    lengths = lengths_of(23)
    order = sampler(batch_size=2, accumulate=3)
    for i in range(3):
        first, second, third = list(order)[3 * i : 3 * i + 3]
        assert min(lengths[list(first.sample_ids)]) >= max(lengths[list(second.sample_ids)])
        assert min(lengths[list(second.sample_ids)]) >= max(lengths[list(third.sample_ids)])


def test_a_rank_without_samples_gets_an_empty_micro_batch():
    last = [list(sampler(5, batch_size=2, world=2, rank=rank))[-1] for rank in range(2)]
    assert [len(m.sample_ids) for m in last] == [1, 0]
    assert last[0].step_tokens == last[1].step_tokens
    assert last[1].step_sequences == 1


def test_start_skips_in_its_epoch_only():
    order = sampler(batch_size=2, accumulate=3, seed=5)
    epochs = []
    for epoch in range(3):
        order.set_epoch(epoch)
        epochs.append(list(order))
    for epoch in range(2):
        for skip in range(len(order) + 1):
            resumed = sampler(batch_size=2, accumulate=3, seed=5)
            resumed.start(epoch, skip)
            assert len(resumed) == len(order)
            assert list(resumed) == epochs[epoch][skip:]  # read ahead, before set_epoch
            resumed.set_epoch(epoch)
            assert list(resumed) == epochs[epoch][skip:]
            resumed.set_epoch(epoch + 1)
            assert list(resumed) == epochs[epoch + 1]
    # A trainer stopped in the middle of epoch 0 calls the rest of it epoch 1.
    resumed.start(0, 2)
    resumed.set_epoch(1)
    assert list(resumed) == epochs[0][2:]
    resumed.set_epoch(2)
    assert list(resumed) == epochs[1]


def test_repeated_samples_count_each_time():
    order = MicroBatches(np.array([0, 0, 1]), np.array([4, 9]), np.array([3, 8]), batch_size=3)
    assert list(order) == [MicroBatch((1, 0, 0), 14, 3)]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_repeats_nothing(world):
    ids, targets = np.array([0, 1, 2, 4, 5]), np.array([1, 2, 3, 100, 5, 6])
    ranks = [list(Sequential(ids, targets, 2, world, rank)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) == len(Sequential(ids, targets, 2, world, 0))
    seen = [i for rank in ranks for m in rank for i in m.sample_ids]
    assert sorted(seen) == ids.tolist()
    assert {(m.step_tokens, m.step_sequences) for rank in ranks for m in rank} == {(17, 5)}
