"""Times as two uint32, [2], the lower half first, because JAX has no wider integers by default.

They are NumPy arrays as long as they are known: so nothing waits for a device, and wrong times raise. Inside jit they
are traced.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from edm2_core.ema.clock import tick
from edm2_core.errors import InputError

_WRONG = np.full(2, 0xFFFFFFFF, np.uint32)


def words(time: Any, /) -> Any:
    """The two halves of a time, which is a whole number or a 0-d array. Raises InputError for other dtypes."""
    if isinstance(time, jax.core.Tracer):
        if not jnp.issubdtype(time.dtype, jnp.integer):
            raise InputError(f"times must be whole numbers, got {time.dtype} inside jit: pass an int32 or uint32")
        wide = time.dtype.itemsize == 8
        negative = jnp.where(time < 0, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
        return jnp.stack([time.astype(jnp.uint32), (time >> 32).astype(jnp.uint32) if wide else negative])
    whole = int(time)
    if whole != time or whole < 0:
        raise InputError(f"times must be whole numbers from 0, got {time}: count images or steps")
    return np.array([whole & 0xFFFFFFFF, whole >> 32 & 0xFFFFFFFF], np.uint32)


def plus(time: Any, delta: Any, /) -> Any:
    """The time that is ``delta`` later."""
    if _known(time, delta):
        return words(number(time) + number(delta))
    low = time[0] + delta[0]
    return jnp.stack([low, time[1] + delta[1] + (low < time[0])])


def since(clock: Any, time: Any, /) -> Any:
    """How much later ``time`` is than ``clock``; modulo 2^64 inside jit. Raises InputError if it is known to be no
    later."""
    if _known(clock, time):
        return words(tick(number(clock), time=number(time), delta=max(number(time) - number(clock), 1)) - number(clock))
    return jnp.stack([time[0] - clock[0], time[1] - clock[1] - (time[0] < clock[0])])


def number(time: Any, /) -> int:
    """A known time as a number."""
    low, high = (int(word) for word in np.asarray(time))
    return low | high << 32


def _known(*times: Any) -> bool:
    return not any(isinstance(time, jax.core.Tracer) for time in times)


def as_float(time: Any, /) -> jax.Array:
    """A time as float32, 0-d."""
    return jnp.asarray(time[1], jnp.float32) * 2.0**32 + jnp.asarray(time[0], jnp.float32)


def checked(clock: Any, time: Any, delta: Any, /) -> Any:
    """The clock after an update: ``time``. If ``time - delta`` is not ``clock``, raises InputError where all are known,
    and is the largest number inside jit."""
    if _known(clock, time, delta):
        return words(tick(number(clock), time=number(time), delta=number(delta)))
    right = jnp.all(plus(clock, delta) == time) & jnp.any(delta != 0) & (time[1] < 1 << 21)
    return jnp.where(right, time, _WRONG)
