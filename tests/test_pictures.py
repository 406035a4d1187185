"""Pictures show exactly the pixels they were given."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backends.pipeline.runs.pictures import save_grid, save_images, save_rows
from edm2_core.errors import InputError

GAP, MARGIN = 4, 12


def _random(n: int, channels: int, size: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, channels, size, size), dtype=np.uint8)


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).transpose(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_saved_images_have_their_own_size_pixels_and_channels(tmp_path: Path, channels: int) -> None:
    images = _random(2, channels)
    paths = [tmp_path / "new" / name for name in ("000003.png", "000007.png")]
    save_images(paths, images)
    assert paths == [tmp_path / "new" / "000003.png", tmp_path / "new" / "000007.png"]
    for path, image in zip(paths, images, strict=True):
        with Image.open(path) as picture:
            assert picture.mode == {1: "L", 3: "RGB"}[channels]
            assert picture.format == "PNG"
        np.testing.assert_array_equal(_read(path), np.broadcast_to(image, (3, 8, 8)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("scale", "pixels"), [(None, 6), (1, 1), (3, 3)])
def test_a_grid_shows_the_images_in_order_each_pixel_a_square(
    tmp_path: Path, channels: int, scale: int | None, pixels: int
) -> None:
    images = _random(6, channels)
    save_grid(tmp_path / "grid.png", images, columns=4, scale=scale)
    grid = _read(tmp_path / "grid.png")
    cell = 8 * pixels
    assert grid.shape == (3, 2 * cell + GAP + 2 * MARGIN, 4 * cell + 3 * GAP + 2 * MARGIN)
    for i, image in enumerate(images):
        top, left = MARGIN + i // 4 * (cell + GAP), MARGIN + i % 4 * (cell + GAP)
        expected = np.broadcast_to(image.repeat(pixels, 1).repeat(pixels, 2), (3, cell, cell))
        np.testing.assert_array_equal(grid[:, top : top + cell, left : left + cell], expected)
        grid[:, top : top + cell, left : left + cell] = 255
    assert (grid == 255).all()


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (4, 2), (10, 4), (64, 8), (100, 10)])
def test_a_grid_is_about_square_by_default(tmp_path: Path, n: int, columns: int) -> None:
    save_grid(tmp_path / "grid.png", _random(n, 1), scale=1)
    assert _read(tmp_path / "grid.png").shape[2] == columns * (8 + GAP) - GAP + 2 * MARGIN


@pytest.mark.parametrize(("size", "cell"), [(8, 48), (28, 56), (64, 64), (256, 256)])
def test_small_images_are_enlarged_and_others_are_not(tmp_path: Path, size: int, cell: int) -> None:
    save_grid(tmp_path / "grid.png", _random(1, 3, size))
    assert _read(tmp_path / "grid.png").shape == (3, cell + 2 * MARGIN, cell + 2 * MARGIN)


def test_rows_show_their_images_at_the_right_of_their_labels(tmp_path: Path) -> None:
    rows = [("raw weights", _random(3, 1)), ("EMA 0.05", 255 - _random(3, 1))]
    save_rows(tmp_path / "rows.png", rows)
    picture = _read(tmp_path / "rows.png")
    width = 3 * 48 + 2 * GAP
    assert picture.shape[1] == 2 * 48 + 2 * GAP + 2 * MARGIN
    cells = picture[:, :, -MARGIN - width : -MARGIN]
    for i, (_, images) in enumerate(rows):
        top = MARGIN + i * (48 + 2 * GAP)
        text = picture[:, top : top + 48, : -2 * MARGIN - width]
        assert text.min() < 100  # there is ink
        for j, image in enumerate(images):
            shown = cells[:, top : top + 48, j * (48 + GAP) :][:, :, :48]
            np.testing.assert_array_equal(shown, np.broadcast_to(image.repeat(6, 1).repeat(6, 2), (3, 48, 48)))
    assert (picture[:, :, :MARGIN] == 255).all()  # no label is cut off
    assert (picture[:, :, -2 * MARGIN - width : -MARGIN - width] == 255).all()  # and none touches an image


def test_labels_of_tiny_rows_stay_readable_and_apart(tmp_path: Path) -> None:
    save_rows(tmp_path / "rows.png", [("a", _random(2, 3, 4)), ("b", _random(2, 3, 4))], scale=1)
    assert _read(tmp_path / "rows.png").shape[1] >= 2 * 14 + 2 * MARGIN


def test_what_is_no_picture_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    latents = _random(2, 4)
    for save in (
        lambda: save_grid(tmp_path / "x.png", latents),
        lambda: save_rows(tmp_path / "x.png", [("x", latents)]),
        lambda: save_images([tmp_path / "0.png", tmp_path / "1.png"], latents),
    ):
        with pytest.raises(InputError, match=r"^a PNG must have 1 or 3 channels, got 4: use --format npz$"):
            save()
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"grid\.png must be writable"):
        save_grid(tmp_path / "file" / "grid.png", _random(1, 1))
