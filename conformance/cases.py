"""The contract: every clause of SPEC.md once, with how it is proved, and all cases that prove one.

There are three kinds of case. Functions of ``edm2_core`` in every array library (:mod:`.core_cases`, run by
test_libraries.py); questions to ports (:mod:`.network_cases`, :mod:`.training_cases`, :mod:`.golden_cases`, run by
test_port.py); and property tests, which name their clauses with :func:`.clauses.proves`.
"""

from functools import lru_cache
from importlib import import_module
from pathlib import Path

from conformance import core_cases, golden_cases, network_cases, training_cases
from conformance.clauses import clauses_of
from conformance.contract import Clause

CORE_CASES = core_cases.CASES
PORT_CASES = (*network_cases.CASES, *training_cases.CASES, *golden_cases.CASES)

_ARRAYS = "float32 arrays without subnormals, to 1e4"
_NETWORK, _SAMPLED = network_cases.NETWORK, network_cases.SAMPLED

CONTRACT = (
    Clause(
        "API-1", "the arguments of each function", "the same call on float64 NumPy", "that of the function's clause"
    ),
    Clause("API-2", "Python numbers", "closed forms", "8 eps of float64"),
    Clause("API-3", "read-only arrays", "no exception, no import", "exact"),
    Clause("API-4", "input that breaks a rule", "the message", "exact"),
    Clause("MP-1", _ARRAYS, "division by the root mean square", "(4 + sqrt(elements)) eps"),
    Clause("MP-2", "every finite float32", "60 digits; quadrature over N(0, 1)", "8 eps; 1e-3 for the rms"),
    Clause("MP-3", "orthogonal arrays of unit rms, any t", "unit rms and the ratio 1 - t : t", "4 eps of magnitudes"),
    Clause("MP-4", "arrays of unit rms, any sizes and t", "unit rms and energies (1-t)^2 : t^2", "4 eps"),
    Clause("MP-5", "positions, frequencies, evenly spaced phases", "mean square 1", "4 eps (1 + |angle|)"),
    Clause("MP-6", "weights, gains; Gaussian inputs", "rows of norm gain; variance gain^2", "MP-1; 6 standard errors"),
    Clause("MP-7", "weights, upstream gradients", "central differences along the weight", "e / (e + rms) + 8 eps / h"),
    Clause("MP-8", "weights", "forcing twice; the layer before", "e^2 + MP-1; 2 e"),
    Clause(
        "MP-9", "images, filters of any even length", "the filter's matrix and its transpose", "8 eps of magnitudes"
    ),
    Clause("EMA-1", "gamma to 1e6, lengths from 1e-6", "moments of the profile in 40 digits", "16 eps x condition"),
    Clause("EMA-2", "lengths, end times", "tanh-sinh quadrature", "1e-9"),
    Clause("EMA-3", "lengths, any sequence of intervals", "the profile's integral", "8 eps (1 + gamma) x updates"),
    Clause("EMA-4", "pairs of times and lengths", "Eq. 151 in 30 digits; quadrature", "64 eps (1 + gamma)"),
    Clause("EMA-5", "stored averages, targets", "the least-squares fit in 60 digits", "64 eps x Gram condition"),
    Clause("EMA-6", "stored averages", "one-hot columns", "64 eps x Gram condition"),
    Clause("EMA-7", "weights of independent increments", "the average tracked from the start", "6 standard errors"),
    Clause("EMA-8", "stored averages, targets", "profiles on a fine grid", "stated in each test"),
    Clause("EMA-9", "time constants, lengths", "quadrature in many digits", "1e-11"),
    Clause("EMA-10", "budgets, ranges, step sizes", "uniform plans of four times the files", "exact"),
    Clause("PRE-1", "noise levels, deviations", "Eqs. 5-8 as printed", "8 eps"),
    Clause("PRE-2", "noise levels, deviations", "variance 1", "16 eps (1 + (sd / sigma)^2)"),
    Clause("LOSS-1", "normal draws", "Eq. 16 as printed", "4 eps (1 + |ln sigma|)"),
    Clause("LOSS-2", "noise levels, deviations", "1 / c_out^2", "8 eps"),
    Clause(
        "LOSS-3",
        "images, noise levels, u; networks",
        "Eq. 21 element by element",
        "16 eps of magnitudes",
        "loss_and_gradients",
    ),
    Clause(
        "LOSS-4",
        "one-hot rows, probabilities, seeds; networks",
        "row by row; each row alone",
        "exact; " + _NETWORK,
        "denoise",
    ),
    Clause("DATA-1", "values, means, scales", "the same on float64", "4 eps of the magnitude"),
    Clause("DATA-2", "moments, noise", "the same on float64", "4 eps of the magnitude"),
    Clause("LR-1", "counts, rates", "Eq. 67 term by term", "4 eps"),
    Clause("SAMPLE-1", "numbers of steps, ranges, rho", "even spacing in the power 1 / rho", "8 rho eps", "sample"),
    Clause("SAMPLE-2", "networks, schedules", "Algorithm 2 written out again", _SAMPLED, "sample"),
    Clause("SAMPLE-3", "means and spreads of Gaussian data", "the closed form of its flow", "the order, to O(1 / n)"),
    Clause("SAMPLE-4", "networks, amounts of churn", "Algorithm 2 written out; the data's spread", _SAMPLED, "sample"),
    Clause("SAMPLE-5", "networks, guides, weights", "guide + w (net - guide)", _SAMPLED, "sample"),
    Clause("SAMPLE-6", "networks, seeds", "the reference, sampled in float64", "one of 256 levels", "sample"),
    Clause("NET-1", "configs that break a rule", "the message", "exact"),
    Clause("NET-2", "configs", "the walk, step by step", "exact"),
    Clause("NET-3", "published sizes", "Table 6", "its printed digits"),
    Clause("NET-4", "configs, seeds", "moments; equality", "6 standard errors", "denoise"),
    Clause("NET-5", "random networks, noise levels, labels", "edm2_core.reference in float64", _NETWORK, "denoise"),
    Clause("NET-6", "heads and widths", "loops over heads and pixels", _NETWORK, "denoise"),
    Clause("NET-7", "networks, batches of three", "each image alone", _NETWORK, "denoise"),
    Clause("NET-8", "conditional networks", "the all-zero label", _NETWORK, "denoise"),
    Clause("NET-9", "random plans, unit-variance input", "rms of every block's output", "[0.5, 1.5]"),
    Clause(
        "NET-10", "rungs, and any of their switches alone", "edm2_core.reference; Table 1's counts", _NETWORK, "denoise"
    ),
    Clause("NET-11", "rectangles, odd sizes, conditions", "edm2_core.reference in float64", _NETWORK, "denoise"),
    Clause("STEP-1", "networks, batches", training_cases.AUTOGRAD, training_cases.GRADIENT, "loss_and_gradients"),
    Clause("STEP-2", "networks, four batches of any sizes", training_cases.TRAINING, training_cases.ADAM, "train"),
    Clause("STEP-3", "networks, batches", "equality", "exact", "train"),
    Clause("STEP-4", "states between two steps", "the run that never stopped; the bytes", "exact", "advance"),
)


@lru_cache
def property_tests() -> dict[str, tuple[str, ...]]:
    """The clauses of each test function by ``file::function``, without test_port, which runs the table of ports."""
    tests = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for name, function in vars(import_module(f"conformance.{path.stem}")).items():
            if name.startswith("test_") and name != "test_port":
                tests[f"{path.name}::{name}"] = clauses_of(function)
    return tests


def cases_of(clause: str) -> list[str]:
    """The names of all that proves ``clause``, of each kind: functions, questions to ports, property tests."""
    functions = [f"`{case.name}`" for case in CORE_CASES if clause in case.clauses]
    questions = [f"`{case.name}`" for case in PORT_CASES if clause in case.clauses]
    tests = [test.partition("::test_")[2].replace("_", " ") for test, named in property_tests().items()
             if clause in named]  # fmt: skip
    kinds = ((functions, "in each library"), (questions, "of each port"), (tests, ""))
    return [f"{', '.join(names)} {where}".strip() for names, where in kinds if names]
