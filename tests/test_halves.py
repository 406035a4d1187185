"""Many numbers at once to and from float16, bit for bit as NumPy does it one by one."""

import numpy as np
import pytest

from backends.pipeline.halves import narrow, widen


def test_every_float16_is_widened_exactly_one_by_one_and_many_at_once():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for halves in (every, every[np.isfinite(every)], every[:0]):
        widen(halves, "F16", wide := np.empty(halves.shape, np.float32))
        assert np.array_equal(wide, halves.astype(np.float32), equal_nan=True)
        assert np.array_equal(np.signbit(wide), np.signbit(halves))


def narrowed(values):
    narrow(values, halves := np.empty(values.shape, np.float16))
    return halves


def test_every_float16_comes_back():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    assert np.array_equal(narrowed(finite.astype(np.float32)).view(np.uint16), finite.view(np.uint16))


@pytest.mark.parametrize("nudge", [-1, 0, 1])
def test_what_lies_between_goes_to_the_nearest_and_ties_to_the_even(nudge):
    every = np.arange(0x0400, 0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)  # from 2^-14 on
    between = (every[1:] + every[:-1]) / 2
    between = (between.view(np.int32) + nudge).view(np.float32)
    for values in (between, -between):
        assert np.array_equal(narrowed(values).view(np.uint16), values.astype(np.float16).view(np.uint16))


def test_small_ones_are_nearest_but_for_what_is_all_but_a_tie():
    values = (np.random.default_rng(0).uniform(-1, 1, 100_000) * 2.0**-14).astype(np.float32)
    off = np.abs(narrowed(values).astype(np.float64) - values)
    assert (off <= 2.0**-25 * (1 + 2.0**-12)).all()
    assert (narrowed(values) != values.astype(np.float16)).mean() < 1e-3


def test_shapes_and_signs_stay():
    values = np.random.default_rng(0).standard_normal((3, 50_001)).astype(np.float32)
    values[0, :3] = (0.0, -0.0, 65504.0)
    halves = narrowed(values)
    assert np.array_equal(halves, values.astype(np.float16))
    assert np.array_equal(np.signbit(halves), np.signbit(values))
