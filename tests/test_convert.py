"""Pictures of any kind become a training set; images become latents and images again."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import PIL
import pytest
from data_files import write
from PIL import Image

from backends.commands.cli import main
from backends.pipeline.data import convert as module
from backends.pipeline.data.convert import convert, open_source
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.data.encode import decode, encode
from backends.pipeline.data.transforms import Settings, transformed
from edm2_core.codec import SD_LATENTS
from edm2_core.errors import InputError

SQUARE = Settings(size=(16, 16), transform="center-crop")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pictures(folder: str = "in", count: int = 5, *, size: tuple[int, int] = (40, 30)) -> Path:
    """Pictures of random colours, of two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = Path(folder, ("cat", "dog")[i % 2], f"{i:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return Path(folder)


def one(image: Image.Image, settings: Settings = SQUARE, *, suffix: str = "png", **options: object) -> np.ndarray:
    """``image``, stored and made into [H, W] or [H, W, C]."""
    path = Path(f"one.{suffix}")
    image.save(path, **options)  # type: ignore[arg-type]
    Path("made.png").write_bytes(transformed(path.read_bytes(), settings))
    with Image.open("made.png") as made:
        return np.asarray(made)


def bands(mode: str = "RGB", size: tuple[int, int] = (32, 16)) -> Image.Image:
    """The left half red, the right half blue."""
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 0, 255), (size[0] // 2, 0, *size))
    return image.convert(mode)


OLD_PILLOW = pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13, reason="Pillow before 13 cannot read its own YCbCr TIFF"
)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", pytest.param("YCbCr", marks=OLD_PILLOW)])
def test_colours_of_any_mode_become_rgb(mode: str) -> None:
    suffix = {"CMYK": "tif", "YCbCr": "tif"}.get(mode, "png")
    made = one(bands(mode), suffix=suffix)
    assert made.shape == (16, 16, 3)
    np.testing.assert_allclose(made[8, [1, 14]], [[255, 0, 0], [0, 0, 255]], atol=3)


@pytest.mark.parametrize(("mode", "level"), [("1", 255), ("L", 255), ("LA", 255)])
def test_grey_is_spread_over_three_channels_or_stays_one(mode: str, level: int) -> None:
    image = Image.new("L", (16, 16), level).convert(mode)
    assert one(image).tolist() == np.full((16, 16, 3), level).tolist()
    assert one(image, Settings(grey=True)).shape == (16, 16)


def test_16_bits_become_8() -> None:
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    made = one(Image.fromarray(values), Settings(grey=True))
    np.testing.assert_array_equal(made.ravel(), np.arange(256))


def test_dark_pictures_of_16_bits_are_scaled_like_bright_ones() -> None:
    assert one(Image.fromarray(np.full((16, 16), 200, np.uint16)), Settings(grey=True)).max() == 1


@pytest.mark.parametrize("values", [np.full((8, 8), 1e4, np.float32), np.full((8, 8), np.nan, np.float32)])
def test_floats_outside_the_range_of_pixels_are_faults(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="values outside 0 to 255"):
        one(Image.fromarray(values), suffix="tif")


def test_transparency_lies_over_the_background() -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert one(clear).max() == 0
    assert one(clear, Settings(background="white")).min() == 255
    paletted = Image.new("P", (16, 16), 0)
    paletted.putpalette([255, 0, 0])
    assert one(paletted, Settings(background="#00ff00"), transparency=0)[0, 0].tolist() == [0, 255, 0]


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: the left side is the top
    made = one(bands(), Settings(), suffix="jpg", exif=exif, quality=100, subsampling=0)
    assert made.shape == (32, 16, 3)
    np.testing.assert_allclose(made[[1, 30], 8], [[255, 0, 0], [0, 0, 255]], atol=5)


def test_of_an_animation_the_first_frame_is_taken() -> None:
    made = one(bands(), Settings(), suffix="gif", save_all=True, append_images=[Image.new("RGB", (32, 16), "white")])
    np.testing.assert_allclose(made[8, [1, 30]], [[255, 0, 0], [0, 0, 255]], atol=3)


def test_transforms_cut_scale_and_pad_as_they_say() -> None:
    """A picture twice as wide as high: its halves show what was cut."""
    middle = one(bands())
    assert (middle[8, 3].tolist(), middle[8, 12].tolist()) == ([255, 0, 0], [0, 0, 255])
    wide = one(bands(size=(64, 64)), Settings(size=(16, 8), transform="center-crop-wide"))
    assert wide.shape == (16, 16, 3)
    assert not wide[[0, 3, 12, 15]].any()
    assert wide[4:12].any(axis=(1, 2)).all()
    fitted = one(bands(), Settings(size=(16, 16), transform="fit", background="white"))
    assert fitted[[0, 3, 12, 15]].min() == 255
    assert fitted[8, 1].tolist() == [255, 0, 0]
    adm = one(bands(size=(70, 67)), Settings(size=(16, 16), transform="center-crop-dhariwal"))
    assert adm.shape == (16, 16, 3)
    assert (adm[8, 1].tolist(), adm[8, 14].tolist()) == ([255, 0, 0], [0, 0, 255])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": "fit"}, "--transform fit needs a --resolution"),
        ({"transform": "center-crop-dhariwal", "size": (16, 8)}, "makes squares, got 16x8"),
        ({"transform": "center-crop-wide", "size": (8, 16)}, "at least the height, got 8x16"),
        ({"background": "nowhere"}, "--background must be a colour .* got 'nowhere'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Settings(**options)


def test_the_output_is_the_official_layout_whatever_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored, with fixed dates; labels and names of the classes; the same data come out."""
    monkeypatch.setattr(module, "CHUNK", 2)
    source = open_source(pictures())
    for workers in (1, 2):
        assert convert(source, Path(f"{workers}.zip"), SQUARE, workers=workers).count == 5
    assert Path("1.zip").read_bytes() == Path("2.zip").read_bytes()
    with zipfile.ZipFile("1.zip") as file:
        infos = file.infolist()
        content = json.loads(file.read("dataset.json"))
    assert [info.filename for info in infos][:2] == ["00000/img00000000.png", "00000/img00000001.png"]
    assert {(info.compress_type, info.date_time) for info in infos} == {(zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))}
    assert content["labels"][2:4] == [["00000/img00000002.png", 0], ["00000/img00000003.png", 1]]
    dataset = open_dataset("1.zip")
    assert (dataset.shape, dataset.format.classes) == ((3, 16, 16), ("cat", "dog"))
    convert(source, Path("out"), SQUARE)
    np.testing.assert_array_equal(open_dataset("out").read(np.arange(5)), dataset.read(np.arange(5)))
    assert not list(Path().glob("*.partial"))


def test_a_conversion_that_was_stopped_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    source, made = open_source(pictures(count=6)), []
    convert(source, Path("whole.zip"), SQUARE)
    make = module._make_chunk

    def stopping(*job: object) -> int:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(job)
        return make(*job)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_make_chunk", stopping)
    with pytest.raises(KeyboardInterrupt):
        convert(source, Path("out.zip"), SQUARE)
    assert not Path("out.zip").exists()
    monkeypatch.setattr(module, "_make_chunk", lambda *job: made.append(job) or make(*job))
    convert(source, Path("out.zip"), SQUARE)
    assert len(made) == 3
    assert Path("out.zip").read_bytes() == Path("whole.zip").read_bytes()


def test_all_broken_pictures_are_named_at_once_or_left_out() -> None:
    folder = pictures()
    (folder / "cat" / "bad.png").write_bytes(b"no image")
    (folder / "dog" / "cut.png").write_bytes((folder / "dog" / "001.png").read_bytes()[:200])
    source = open_source(folder)
    with pytest.raises(
        InputError, match=r"got 2 of 7 that are not: .*bad\.png .*; .*cut\.png .*: mend them, or"
    ) as caught:
        convert(source, Path("out.zip"), SQUARE)
    assert "\n" not in str(caught.value)
    assert not Path("out.zip").exists()
    made = convert(source, Path("out.zip"), SQUARE, skip_broken=True)
    assert (made.count, len(made.faults)) == (5, 2)
    dataset = open_dataset("out.zip")
    assert dataset.labels(np.arange(5)).tolist() == [0, 0, 0, 1, 1]


def test_a_picture_that_was_mended_is_converted_again() -> None:
    folder = pictures()
    bad, content = folder / "cat" / "000.png", (folder / "cat" / "000.png").read_bytes()
    bad.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1 of 5 that are not: in/cat/000\.png is not an image that Pillow can read"):
        convert(open_source(folder), Path("out.zip"), SQUARE)
    bad.write_bytes(content)
    assert convert(open_source(folder), Path("out.zip"), SQUARE).count == 5


def test_without_a_resolution_all_must_have_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    folder = pictures(count=4)
    Image.new("RGB", (9, 7)).save(folder / "dog" / "001.png")
    with pytest.raises(InputError, match=r"1 of 4 .*001\.png is 9x7, not 40x30 as the first: .* a --transform"):
        convert(open_source(folder), Path("out.zip"), Settings())
    made = convert(open_source(folder), Path("out.zip"), Settings(), skip_broken=True)
    assert (made.count, len(made.faults), open_dataset("out.zip").shape) == (3, 1, (3, 30, 40))


def test_where_all_are_broken_nothing_is_written() -> None:
    Path("in").mkdir()
    Path("in", "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1 of 1 that are not: .* nothing else is left"):
        convert(open_source(Path("in")), Path("out.zip"), SQUARE, skip_broken=True)
    assert not Path("out.zip").exists()


def test_a_folder_that_no_conversion_made_is_left_alone() -> None:
    source = open_source(pictures())
    for name in ("a", "b"):
        Path(f"{name}.zip.partial").mkdir()
    Path("a.zip.partial", "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.zip\.partial, which must be new"):
        convert(source, Path("a.zip"), SQUARE)
    assert Path("a.zip.partial", "thesis.txt").read_text(encoding="utf-8") == "mine"
    Path("c.zip.partial").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="which must be new"):
        convert(source, Path("c.zip"), SQUARE)
    assert convert(source, Path("b.zip"), SQUARE).count == 5


def test_links_and_names_that_lead_out_are_refused() -> None:
    inside = pictures() / "cat" / "000.png"
    Path("linked").mkdir()
    Path("linked", "a.png").symlink_to(inside.absolute())
    with pytest.raises(InputError, match=r"linked/a\.png"):
        open_source(Path("linked"))
    with zipfile.ZipFile("climbing.zip", "w") as file:
        file.writestr("../up.png", inside.read_bytes())
    with pytest.raises(InputError, match=r"got '\.\./up\.png'"):
        open_source(Path("climbing.zip"))


@pytest.mark.parametrize("words", [["--max-images", "0"], ["--max-images", "-1"], ["--workers", "0"]])
def test_counts_below_one_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pictures()
    assert main(["dataset", "convert", "in", "out.zip", "--resolution", "16", "--transform", "fit", *words]) == 2
    assert "must be at least 1, got" in capsys.readouterr().err
    assert not Path("out.zip").exists()


def test_sizes_that_differ_are_named_where_no_transform_is(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures(count=2)
    with pytest.raises(InputError, match=r"2 of 2 that are not: .*000\.png is 40x30, not 16x16: name a --transform"):
        convert(open_source(folder), Path("out.zip"), Settings(size=(16, 16)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"2 of 2 that are not: .*1200 pixels\) exceeds limit"):
        convert(open_source(folder), Path("bomb.zip"), SQUARE)


def test_the_command_converts_and_says_what_it_made(capsys: pytest.CaptureFixture[str]) -> None:
    pictures()
    settings = ["--resolution", "16x8", "--transform", "center-crop", "--workers", "1", "--max-images", "4"]
    words = ["dataset", "convert", "in", "out.zip", *settings]
    assert main(words) == 0
    assert "wrote     out.zip: 4 images, 2 classes" in capsys.readouterr().out
    assert main(["dataset", "info", "out.zip", "--picture", "seen.png"]) == 0
    said = capsys.readouterr().out
    assert "16x8 with 3 channels" in said
    assert "2 classes: cat 3, dog 1" in said
    assert Path("seen.png").exists()
    assert main(words) == 2
    assert "the output must be new, got out.zip" in capsys.readouterr().err
    assert main(["dataset", "convert", "gone", "out2.zip"]) == 2
    assert main(["dataset", "convert", "in", "o.zip", "--resolution", "16x"]) == 2
    assert "--resolution must be a width and a height such as 64x64, got '16x'" in capsys.readouterr().err


def test_statistics_are_measured_and_stored(capsys: pytest.CaptureFixture[str]) -> None:
    np.save("a.npy", np.random.default_rng(0).normal(3, 2, (50, 2, 8, 8)).astype(np.float32))
    assert main(["dataset", "stats", "a.npy", "--save"]) == 0
    assert "50 samples of 2x8x8" in capsys.readouterr().out
    assert Path("a.npy.stats.json").exists()
    assert open_dataset("a.npy").format.codec.mean[0] == pytest.approx(3, abs=0.2)


class Half:
    """An encoder that takes the mean of each 2x2 pixels, and a decoder that doubles them."""

    @staticmethod
    def encode(images: np.ndarray) -> np.ndarray:
        n, c, h, w = images.shape
        mean = 10 * images.reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5)) + 1
        return np.concatenate([mean, np.full_like(mean, 0.25)], axis=1)

    @staticmethod
    def decode(latents: np.ndarray) -> np.ndarray:
        return ((latents - 1) / 10).repeat(2, axis=2).repeat(2, axis=3)


@pytest.mark.parametrize(
    ("name", "published"), [("stabilityai/sd-vae-ft-mse", True), ("/a/sd-vae-ft-mse", True), ("b", False)]
)
def test_the_latents_of_stable_diffusion_get_their_published_statistics(name: str, published: bool) -> None:
    """Also of a copy on the disk; others their own."""
    convert(open_source(pictures()), Path("images.zip"), SQUARE)

    def encoder(images: np.ndarray) -> np.ndarray:
        return Half.encode(images)[:, [0, 1, 2, 0, 3, 4, 5, 3]]

    manifest = encode(open_dataset("images.zip"), Path("latents.zip"), encoder, name=name)
    assert ((manifest.mean, manifest.std) == SD_LATENTS) == published


def test_images_become_latents_and_images_again() -> None:
    convert(open_source(pictures()), Path("images.zip"), SQUARE)
    images = open_dataset("images.zip")
    manifest = encode(images, Path("latents.zip"), Half.encode, name="half", batch=2)
    latents = open_dataset("latents.zip")
    codec = latents.format.codec
    assert (latents.shape, codec.stored, codec.vae, latents.format.classes) == (
        (3, 8, 8),
        "moments",
        "half",
        ("cat", "dog"),
    )
    moments = Half.encode(images.format.codec.encode(images.read(np.arange(5))))
    np.testing.assert_allclose(latents.read(np.arange(5)), moments, rtol=1e-6)
    means = moments[:, :3].astype(np.float64)
    np.testing.assert_allclose(manifest.mean, means.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(manifest.std, np.sqrt(means.var(axis=(0, 2, 3)) + 0.25**2), rtol=1e-6)
    decode(latents, Path("decoded.zip"), Half.decode)
    decoded = open_dataset("decoded.zip")
    wanted = Half.decode(moments[:, :3]) * 127.5 + 127.5
    assert np.abs(decoded.read(np.arange(5)).astype(float) - wanted).max() <= 0.51
    assert decoded.labels(np.arange(5)).tolist() == [0, 0, 0, 1, 1]
    for call in (
        lambda: encode(latents, Path("x.zip"), Half.encode, name="half"),
        lambda: decode(images, Path("x.zip"), Half.decode),
    ):
        with pytest.raises(InputError, match=r"^data to (en|de)code must be"):
            call()
    shutil.rmtree("in")


def labels_or_error(path):
    try:
        return open_dataset(path).labels(np.arange(4)).tolist()
    except InputError as error:
        return "dataset.json" if "dataset.json" in str(error) else str(error)


def test_a_changed_byte_of_the_labels_that_it_wrote_is_found(tmp_path):
    for index in range(4):
        write(tmp_path / "photographs" / "abcd"[index] / f"{index}.png", seed=index)
    assert main(["dataset", "convert", str(tmp_path / "photographs"), str(tmp_path / "data")]) == 0
    manifest = tmp_path / "data" / "dataset.json"
    whole, wanted = manifest.read_bytes(), open_dataset(tmp_path / "data").labels(np.arange(4)).tolist()
    assert json.loads(whole)["classes"] == ["a", "b", "c", "d"]
    for at in range(len(whole)):
        manifest.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert labels_or_error(tmp_path / "data") in (wanted, "dataset.json"), at
    manifest.write_text(json.dumps({key: value for key, value in json.loads(whole).items() if key != "xxh3"}))
    assert open_dataset(tmp_path / "data").labels(np.arange(4)).tolist() == wanted
