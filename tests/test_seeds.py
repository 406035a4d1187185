"""Noise and labels depend on their own seed alone; lists of seeds are parsed strictly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.pipeline.data import seeds
from backends.pipeline.data.labels import one_hot
from backends.pipeline.data.seeds import torch_labels, torch_noise
from backends.pipeline.runs.command_line import parse_seeds
from edm2_core.errors import InputError

SHAPE = (2, 3, 4)
PINNED_NOISE = [1.4013326168060303, -0.3160632252693176, -0.8543017506599426]
PINNED_CHURN = [-2.0743629932403564, 0.45089006423950195, 1.1424260139465332]
PINNED_LABELS = [2, 7, 2, 5, 2, 5, 5, 3, 9, 8]
some_seeds = st.lists(st.integers(0, 10**18 - 1), min_size=1, max_size=5)


@settings(deadline=None)
@given(some_seeds, st.integers(0, 9))
def test_a_row_depends_on_its_own_seed_alone(chosen: list[int], step: int) -> None:
    noise, churn = seeds.noise(chosen, SHAPE), seeds.churn_noise(chosen, SHAPE, step=step)
    labels = seeds.labels(chosen, 10)
    for i, seed in enumerate(chosen):
        np.testing.assert_array_equal(noise[i], seeds.noise([seed], SHAPE)[0])
        np.testing.assert_array_equal(churn[i], seeds.churn_noise([seed], SHAPE, step=step)[0])
        assert labels[i] == seeds.labels([seed], 10)[0]


def test_shapes_and_dtypes_hold_for_no_seed_too() -> None:
    for chosen in ([], [5], [5, 6]):
        assert (
            seeds.noise(chosen, SHAPE).shape == seeds.churn_noise(chosen, SHAPE, step=0).shape == (len(chosen), *SHAPE)
        )
        assert seeds.noise(chosen, SHAPE).dtype == seeds.churn_noise(chosen, SHAPE, step=0).dtype == np.float32
        assert seeds.labels(chosen, 3).shape == (len(chosen),)
        assert seeds.labels(chosen, 3).dtype == np.int64


def test_seeds_purposes_and_steps_are_different_streams() -> None:
    rows = [*seeds.noise([0, 1, 2**40], (8,))]
    rows += [seeds.churn_noise([seed], (8,), step=step)[0] for seed in (0, 1) for step in (0, 1, 2)]
    assert len({row.tobytes() for row in rows}) == len(rows)
    assert len(set(np.concatenate(rows).tolist())) == 8 * len(rows)


def test_noise_is_standard_normal_and_labels_are_uniform() -> None:
    noise = seeds.noise(range(1000), (100,)).astype(np.float64)  # standard error of the mean: 1e5 ** -0.5
    assert abs(noise.mean()) < 5 * 1e5**-0.5
    assert abs(noise.var() - 1) < 5 * (2 / 1e5) ** 0.5
    counts = np.bincount(seeds.labels(range(2000), 10), minlength=10)  # standard deviation: (2000 * 0.1 * 0.9) ** 0.5
    assert len(counts) == 10
    assert np.abs(counts - 200).max() < 5 * 180**0.5


def test_streams_are_the_same_as_ever() -> None:
    """Pinned: a change here changes every picture that anyone has reproduced by seed."""
    np.testing.assert_array_equal(seeds.noise([7], (3,))[0], np.array(PINNED_NOISE, np.float32))
    np.testing.assert_array_equal(seeds.churn_noise([7], (3,), step=2)[0], np.array(PINNED_CHURN, np.float32))
    assert seeds.labels(range(10), 10).tolist() == PINNED_LABELS


def test_one_hot_has_a_single_one_at_the_label() -> None:
    rows = one_hot(np.array([2, 0]), 3)
    assert rows.dtype == np.float32
    assert rows.tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_refused(label: int) -> None:
    with pytest.raises(InputError, match=f"^a class must be from 0 to 2, got {label}: "):
        one_hot(np.array([0, label]), 3)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("5", [5]),
        ("0-3", [0, 1, 2, 3]),
        ("0-2,7", [0, 1, 2, 7]),
        ("9, 3-3", [9, 3]),
        ("999999999999999999", [10**18 - 1]),
    ],
)
def test_a_list_of_seeds_is_read_in_its_order(text: str, meaning: list[int]) -> None:
    assert parse_seeds(text) == meaning


@pytest.mark.parametrize(
    "text",
    ["", "a", "-1", "1-", "1,,2", "1.5", "3-1", "1-2-3", "0-5,3", "1 2", "1\n2", "0-99999999999", "9" * 5000, "٣"],
    ids=lambda text: ascii(text[:12]),
)
def test_any_other_text_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(
        InputError, match=r"^seeds must be numbers and ranges such as 0-63,70, got .+: correct the list$"
    ) as e:
        parse_seeds(text)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 250


FIRST = [-1.1258398, -1.5255959, -0.82013452, -1.1218369, 1.8423299]
LAST = [0.39039579, 0.56311435, -0.30043155, -0.15158446, 0.69895756]


def test_seeds_of_torch_are_those_of_the_official_sampler() -> None:
    """Numbers that the official sampler drew on a CPU for latents of 4x8x8 and 1000 classes; a seed beyond 2^32."""
    pytest.importorskip("torch")
    seeds = [0, 1, 7, 123456, 4294967301]
    assert torch_labels(seeds, (4, 8, 8), 1000).tolist() == [757, 336, 37, 462, 234]
    drawn = torch_noise(seeds, (4, 8, 8))
    assert drawn.dtype == np.float32
    assert drawn[:, 0, 0, 0].tolist() == pytest.approx(FIRST, rel=1e-6)
    assert drawn[:, 3, 7, 7].tolist() == pytest.approx(LAST, rel=1e-6)
