"""Every function of edm2_core, in every array library, against the same call on NumPy float64 arrays (SPEC API)."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conformance import measure, narrow, tolerance
from conformance.cases import CORE_CASES as CASES
from conformance.clauses import proves
from conformance.core_cases import Case
from conformance.libraries import (
    LIBRARIES,
    Library,
    check_same_kind,
    each_half,
    each_library,
    each_wide_library,
    flat,
    to_numpy,
)
from edm2_core import codec, ema, errors, loss, mp, precond, sampler, schedule

each_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
FLOATS_ONLY = {  # no arrays in or out
    schedule.learning_rate,
    sampler.noise_levels,
    sampler.step_sizes,
    sampler.next_churn,  # an array as it comes
    mp.blend,
    ema.plan_from_json,
    ema.plan_snapshots,
    ema.uniform_plan,
    ema.worst_error,
}


@proves("API-1")
@each_library
@each_case
def test_case_in_library(library: Library, case: Case) -> None:
    """The result has the library, dtype and device of the input, and the value of NumPy float64."""
    check_case(library, case, "float32")


@proves("API-1")
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if not case.by_host])
def test_case_compiled(case: Case) -> None:
    """The same under jax.jit."""
    pytest.importorskip("jax", reason="jax is not installed")
    (library,) = (library for library in LIBRARIES if library.name == "jax")
    check_case(library, replace(case, call=library.compiled(case.call)), "float32", oracle=case.call)


@proves("API-1")
@each_wide_library
@each_case
def test_case_in_float64(library: Library, case: Case) -> None:
    """float64 in gives float64 out; twice the tolerance, because the NumPy oracle rounds too."""
    check_case(library, case, "float64", growth=2)


def check_case(library: Library, case: Case, dtype: str, *, growth: float = 1, oracle: Any = None) -> None:
    @given(case.arguments)
    def check(arguments: tuple[np.ndarray, ...]) -> None:
        given_arrays = [library.array(argument.astype(dtype)) for argument in arguments]
        result = case.call(*given_arrays)
        check_same_kind(result, given_arrays[0])
        exact = [argument.astype(np.float64) for argument in arguments]
        wanted = flat((oracle or case.call)(*exact))
        scales = flat(case.scale(*exact)) if case.scale else [np.abs(array) for array in wanted]
        for out, want, scale in zip(flat(result), wanted, scales, strict=True):
            check_close(out, want, growth * case.growth * tolerance.eps(dtype) * scale + case.floor, what=case.name)

    check()


def check_close(got: Any, wanted: np.ndarray, allowed: Any, *, what: str) -> None:
    got = to_numpy(got)
    assert got.shape == wanted.shape
    off = np.abs(got - wanted) / allowed
    worst = np.unravel_index(np.argmax(off), off.shape) if off.ndim else ()
    pair: dict[str, Any] = {"got": float(got[worst]), "wanted": float(wanted[worst])}
    measure.within(float(off[worst]), 1.0, what=what, why="in units of growth x eps of its own scale", **pair)


@proves("API-1")
@pytest.mark.parametrize("fault", ["float64", "namespace"])
def test_the_narrow_library_is_narrow(fault: str) -> None:
    """The library without float64 refuses it."""
    with pytest.raises((TypeError, AttributeError), match="no float64"):
        narrow.asarray(np.zeros(1)) if fault == "float64" else narrow.xp.float64


@proves("API-3")
@each_case
def test_inputs_are_only_read(case: Case) -> None:
    """No function writes to its arguments."""

    @given(case.arguments)
    def check(arguments: tuple[np.ndarray, ...]) -> None:
        for argument in arguments:
            argument.setflags(write=False)
        case.call(*arguments)

    check()


HALF: dict[str, Callable[..., Any]] = {
    "normalize": mp.normalize,
    "mp_silu": mp.mp_silu,
    "silu": mp.silu,
    "mp_sum": lambda x: mp.mp_sum(x, x, t=0.3),
    "mp_cat": lambda x: mp.mp_cat(x, x, axis=1),
    "mp_fourier": lambda x: mp.mp_fourier(x[:, 0, 0, 0], x[0, 0, 0, :], x[0, 0, 1, :]),
    "mp_weight": lambda x: mp.mp_weight(x, gain=0.5),
    "resample": lambda x: mp.resample(x, mode="down"),
}


@proves("API-1")
@pytest.mark.parametrize("name", HALF)
@each_half
def test_half_precision(library: Library, dtype: str, name: str) -> None:
    """Half precision in gives half precision out; sums are computed in float32."""
    x = library.array(np.random.default_rng(0).standard_normal((2, 4, 16, 16)).astype(np.float32), dtype)
    wide = library.xp.asarray(x, dtype=library.xp.float32)
    result = HALF[name](x)
    check_same_kind(result, x)
    allowed = 4 * tolerance.eps(dtype) * (np.abs(to_numpy(HALF[name](wide))) + 0.25)
    got = library.xp.asarray(result, dtype=library.xp.float32)
    check_close(got, to_numpy(HALF[name](wide)), allowed, what=f"{name} in {dtype}")


NUMBERS = {
    "mp_silu": (lambda: mp.mp_silu(1.0), 1 / (1 + np.exp(-1)) / 0.596),
    "silu": (lambda: mp.silu(1.0), 1 / (1 + np.exp(-1))),
    "blend": (lambda: mp.blend(0.3)[0], 0.7 / np.sqrt(0.58)),
    "mp_sum": (lambda: mp.mp_sum(1.0, 2.0, t=0.3), 1.3 / np.sqrt(0.58)),
    "sigma_rel_to_gamma": (lambda: ema.sigma_rel_to_gamma(12**-0.5), 0.0),
    "gamma_to_sigma_rel": (lambda: ema.gamma_to_sigma_rel(0), 12**-0.5),
    "beta": (lambda: ema.beta(12**-0.5, t_next=4, t_delta=1), 0.75),
    "profile": (lambda: ema.profile(0.5, end_time=2, sigma_rel=12**-0.5), 0.5),
    "inner_product": (lambda: ema.inner_product(time_a=2, sigma_rel_a=0.1, time_b=2, sigma_rel_b=12**-0.5), 0.5),
    "noise_level": (lambda: loss.noise_level(0, P_mean=1.0), np.e),
    "weight": (lambda: loss.weight(1, sigma_data=2.0), 1.25),
    "precondition": (lambda: precond.precondition(1.0).c_skip, 0.2),
    "learning_rate": (lambda: schedule.learning_rate(0, batch=1, ref_lr=1.0, ref_batches=1, rampup_nimg=0), 1.0),
}


@proves("API-2")
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_give_floats(name: str) -> None:
    """Python numbers give a Python float of float64 precision."""
    call, wanted = NUMBERS[name]
    result = call()
    assert type(result) is float
    assert result == pytest.approx(wanted, rel=8 * tolerance.eps("float64"), abs=1e-14)


@proves("API-2")
def test_coefficients_of_lists_are_float64() -> None:
    """Lists and numbers give NumPy float64."""
    result = ema.coefficients(in_time=[1, 2], in_sigma_rel=[0.1, 0.1], out_time=2, out_sigma_rel=0.2)
    assert isinstance(result, np.ndarray)
    assert result.dtype == np.float64
    assert result.shape == (2, 1)


@proves("API-1")
def test_every_public_function_has_a_case() -> None:
    """Every public function of edm2_core is in the table of cases, or takes and gives Python floats only."""
    public = {
        function
        for module in (mp, ema, precond, loss, schedule, sampler, codec)
        for name, function in vars(module).items()
        if inspect.isfunction(function) and not name.startswith("_") and function.__module__.startswith(module.__name__)
    }
    in_table = {case.function for case in CASES if case.function.__qualname__ == case.function.__name__}  # no methods
    assert public == in_table | FLOATS_ONLY


@proves("API-3")
def test_core_imports_no_framework() -> None:
    """Importing edm2_core loads no framework."""
    modules = "ema, errors, loss, mp, network, precond, presets, reference, sampler, schedule"
    code = (
        f"import sys; from edm2_core import {modules}; print({{'torch', 'jax', 'mlx', 'backends'}} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


@proves("API-4")
@given(st.floats(allow_nan=False))
def test_errors_are_one_line(value: float) -> None:
    """The message is one line and shows the value."""
    if 0 < value <= 12**-0.5 * (1 + 1e-6):
        return
    with pytest.raises(errors.InputError, match=r"sigma_rel must be within .*, got") as caught:
        ema.sigma_rel_to_gamma(value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)
