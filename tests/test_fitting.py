"""How many images of a step fit: equal parts of a share, fewer where memory is short, all where nothing is known."""

from dataclasses import replace

import pytest
from toy_port import CONFIG

from backends.pipeline.runs.fitting import Room, free_bytes, images_at_a_time, step_bytes
from edm2_core.network import activation_count

ROOM = Room(devices=2, free=None, kept=14)
GiB = 1 << 30


def at_a_time(free, batch=96, room=ROOM):
    return images_at_a_time(CONFIG, batch, replace(room, free=free), precision="float32")


def test_the_outputs_of_blocks_are_counted():
    """Encoder: 8x8 conv and block of 4 channels, 4x4 down and block of 8; decoder: 4x4 in0, in1 and two blocks of 8,
    8x8 up of 8, two blocks of 4."""
    encoder = 64 * (4 + 4) + 16 * (4 + 8)
    decoder = 16 * 8 * 4 + 64 * (8 + 4 + 4)
    assert activation_count(CONFIG) == encoder + decoder


def test_all_fit_where_there_is_room_and_where_nothing_is_known():
    assert at_a_time(100 * GiB) is None
    assert at_a_time(None) is None
    assert images_at_a_time(CONFIG, 97, replace(ROOM, free=1), precision="float32") is None  # no equal shares


@pytest.mark.parametrize("images", [1, 2, 3, 4, 6, 8, 12, 16, 24])
def test_the_most_that_fits_divides_the_share(images):
    """A share of 48; the free memory is just enough for ``images``, with three tenths to spare."""
    need = step_bytes(CONFIG, images, ROOM, precision="float32")
    assert at_a_time(int(need / 0.7) + 2) == images
    assert at_a_time(int(need / 0.7) - 2) == max(n for n in (1, 1, 2, 3, 4, 6, 8, 12, 16, 24) if n < images or n == 1)


def test_where_not_even_one_fits_it_is_one():
    assert at_a_time(0) == 1


def test_this_machine_says_what_is_free():
    free = free_bytes()
    assert free is None or 10 << 20 < free < 1 << 50
