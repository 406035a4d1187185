"""Many float16 numbers at once, bit for bit as NumPy widens them one by one."""

import numpy as np

from backends.pipeline.halves import widen


def test_every_float16_is_widened_exactly_one_by_one_and_many_at_once():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for halves in (every, every[np.isfinite(every)], every[:0]):
        widen(halves, "F16", wide := np.empty(halves.shape, np.float32))
        assert np.array_equal(wide, halves.astype(np.float32), equal_nan=True)
        assert np.array_equal(np.signbit(wide), np.signbit(halves))
