"""The least-squares reconstruction of an average of any length from stored ones, and its error."""

from typing import Any

import numpy as np

from ..arrays import from_host, to_host
from ..errors import InputError
from .profiles import check_range, inner_products


def coefficients(*, in_time: Any, in_sigma_rel: Any, out_time: Any, out_sigma_rel: Any) -> Any:
    """Weights with which stored averages add up to others: average_out[j] = sum_i coefficients[i, j] * average_in[i].

    The least-squares fit of the output profile by the input profiles that end no later (later snapshots get 0), scaled
    to sum to 1. Computed in float64 on the host whatever the library; the minimum-norm answer where inputs repeat.

    Args:
        in_time, in_sigma_rel: when each stored average was taken and its length; shape [n_in], or broadcast to it.
        out_time, out_sigma_rel: the same of the averages wanted; shape [n_out], or broadcast to it.

    Returns:
        [n_in, n_out], in the library, dtype and device of ``in_sigma_rel``; NumPy float64 for lists and numbers.

    Source: Algorithm 3, Eq. 151. Departs from the paper: each column is divided by its sum, as published averages are.

    Raises:
        InputError: no inputs, a time that is not positive, a length outside (0, 0.2887), a target before every input.
    """
    t_in, s_in = _vectors(in_time, in_sigma_rel, "in")
    t_out, s_out = _vectors(out_time, out_sigma_rel, "out")
    unit = max(t_in.max(), t_out.max())
    t_in, t_out = t_in / unit, t_out / unit
    gram = inner_products(t_in[:, None], s_in[:, None], t_in[None], s_in[None])
    target = inner_products(t_in[:, None], s_in[:, None], t_out[None], s_out[None])
    scale = np.diagonal(gram) ** -0.5  # unit diagonal: short and long averages count alike in the cut of small values
    result = np.zeros_like(target)
    for end in np.unique(t_out):
        rows, columns = t_in <= end, t_out == end
        if not rows.any():
            raise InputError(
                f"a target must not lie before every snapshot, got {end * unit:g} with the first at "
                f"{t_in.min() * unit:g}: choose a later target"
            )
        among = gram[np.ix_(rows, rows)] * np.outer(scale[rows], scale[rows])
        wanted = target[np.ix_(rows, columns)] * scale[rows, None]
        fit = np.linalg.lstsq(among, wanted, rcond=len(among) * np.finfo(np.float64).eps)[0] * scale[rows, None]
        result[np.ix_(rows, columns)] = fit / fit.sum(axis=0)
    return from_host(result, like=in_sigma_rel)


def _vectors(time: Any, sigma_rel: Any, side: str) -> tuple[np.ndarray, np.ndarray]:
    times, lengths = np.broadcast_arrays(np.atleast_1d(to_host(time)), to_host(sigma_rel))
    if times.ndim != 1 or times.size == 0:
        raise InputError(
            f"{side}_time and {side}_sigma_rel must be one or more numbers in a row, got shape {times.shape}"
        )
    check_range(times, f"{side}_time", "positive", lambda x: x > 0)
    return times, lengths
