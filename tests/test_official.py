"""Published checkpoints become snapshots of ours, and nothing in a pickle is ever executed."""

import collections
import copyreg
import io
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from official_files import CONFIG, NAME, PARAMS, latents, network, thing, write

from backends.commands.cli import main
from backends.pipeline.checkpoints.official import LICENCE, images_seen, read_official
from backends.pipeline.checkpoints.snapshots import load_snapshot
from backends.pipeline.runs.networks import stored_network
from edm2_core.codec import SD_LATENTS, Codec, DataFormat
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.network import initialize

torch = pytest.importorskip("torch", reason="official pickles hold PyTorch's storages")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_a_network_comes_out_as_it_went_in(tmp_path, dtype):
    path = write(tmp_path / NAME, lambda: network(dtype=getattr(torch, dtype)))
    read = read_official(path)
    assert (read.nimg, read.length, read.config) == (16384 * 1024, Length.of(0.05), CONFIG)
    assert read.data == DataFormat()
    assert read.params.keys() == PARAMS.keys()
    for name, array in PARAMS.items():
        wanted = array if name.endswith(("freqs", "phases")) else torch.from_numpy(array).to(getattr(torch, dtype))
        assert read.params[name].dtype == np.float32
        assert np.array_equal(read.params[name], np.asarray(torch.as_tensor(wanted).float()))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_is_read(tmp_path, protocol):
    path = write(tmp_path / NAME, network, protocol=protocol)
    assert np.array_equal(read_official(path).params["unet.out_conv.weight"], PARAMS["unet.out_conv.weight"])


def test_the_command_writes_a_snapshot_and_names_the_licence(tmp_path, capsys):
    path = write(tmp_path / NAME, network)
    assert main(["import", str(path)]) == 0
    said = capsys.readouterr().out
    assert LICENCE in said
    assert "CC BY-NC-SA" in said
    made = load_snapshot(path.with_suffix(".safetensors"))
    assert made.config == CONFIG
    assert main(["import", str(path)]) == 2
    assert "--out must be a new file" in capsys.readouterr().err
    assert main(["import", str(path), "--out", str(tmp_path / "b"), "--nimg", "1Mi", "--sigma-rel", "0.1"]) == 0
    made = load_snapshot(tmp_path / "b")
    assert (made.nimg, made.length) == (1 << 20, Length.of(0.1))


@pytest.mark.parametrize("older", [False, True])
def test_the_encoder_of_latents_becomes_their_codec(tmp_path, older):
    config = replace(CONFIG, img_channels=4)
    path = tmp_path / NAME
    write(path, lambda: network(initialize(config, seed=1), config), encoder=latents, protocol=2 if older else None)
    if older:  # the names of NumPy before version 2
        name = b"cnumpy._core.multiarray\n"
        assert name in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(name, b"cnumpy.core.multiarray\n"))
    codec = read_official(path).data.codec
    assert (codec.stored, codec.vae) == ("moments", "stabilityai/sd-vae-ft-mse")
    official = Codec.standardizing(*SD_LATENTS)
    assert codec.mean == pytest.approx(official.mean, rel=1e-6)
    assert codec.scale == pytest.approx(official.scale, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: thing("StabilityVAEEncoder", scale=np.ones(4), bias=np.ones(4)), "4 scales for 3 channels"),
        (lambda: thing("StabilityVAEEncoder", bias=np.ones(4)), "an encoder with scale and bias"),
        (lambda: thing("StabilityVAEEncoder", scale=np.array([None] * 3), bias=np.ones(3)), "dtype 'O8'"),
        (lambda: thing("OwnEncoder"), "an encoder of pixels or of Stability's latents, got OwnEncoder"),
    ],
)
def test_an_encoder_that_cannot_be_ours_is_refused(tmp_path, make, message):
    path = write(tmp_path / NAME, network, encoder=make)
    with pytest.raises(InputError, match=message) as caught:
        read_official(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kimg", "images"),
    [(2147483, 1 << 31), (1879048, 1792 << 20), (939524, 896 << 20), (0, 0), (1, 1024), (127, 127000)],
)
def test_images_are_a_multiple_of_1024_where_there_is_one(kimg, images):
    """As official names are made: thousands of images, rounded down. None of 127000 to 127999 is such a multiple."""
    assert images_seen(kimg) == images
    assert images // 1000 == kimg


def test_a_pickle_beside_its_import_counts_once_and_hides_no_other(tmp_path, capsys):
    paths = [write(tmp_path / f"network-snapshot-{kimg:07d}-0.050.pkl", network) for kimg in (8000, 16000, 24000)]
    assert main(["import", str(paths[1])]) == 0
    assert main(["reconstruct", str(tmp_path), "--sigma-rels", "0.07", "--at", "24000512"]) == 0
    assert "files     3, from time 8000512 to 24000512" in capsys.readouterr().out


def test_networks_of_one_name_but_for_their_kind_are_imported_side_by_side(tmp_path):
    for name in ("edm2-img64-s-0016777-0.050", "edm2-img64-xs-uncond-0016777-0.050"):
        assert main(["import", str(write(tmp_path / f"{name}.pkl", network))]) == 0
        assert (tmp_path / f"{name}.safetensors").exists()


def test_a_network_is_named_by_a_pickle_or_a_folder_of_pickles(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for kimg in (0, 8000, 16000):
        write(folder / f"network-snapshot-{kimg:07d}-0.050.pkl", network)
        write(folder / f"network-snapshot-{kimg:07d}-0.100.pkl", network)
    for name in ("training-state-0016000.pt", "training_options.json", "stats.jsonl", "log.txt"):
        (folder / name).write_bytes(b"{}")
    assert stored_network(folder).length == Length.of(0.1)
    assert stored_network(folder, sigma_rel=0.07).length == Length.of(0.07)
    file = write(tmp_path / "guide.pkl", network)
    assert (stored_network(file).length, stored_network(file).nimg) == (None, 0)
    assert np.array_equal(stored_network(file).params["unet.out_gain"], PARAMS["unet.out_gain"])


def test_a_folder_of_pickles_is_reconstructed_from(tmp_path, capsys):
    for kimg in (0, 8000, 16000):
        for s in (0.05, 0.1):
            write(tmp_path / f"network-snapshot-{kimg:07d}-{s:.3f}.pkl", network)
    (tmp_path / "training-state-0016000.pt").write_bytes(b"x")
    assert main(["reconstruct", str(tmp_path), "--sigma-rels", "0.07", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "left out  network-snapshot-0000000-0.050.pkl, network-snapshot-0000000-0.100.pkl: time 0" in out
    assert "files     4, from time 8000512 to 16000000" in out
    made = load_snapshot(tmp_path / "reconstructed" / "0016000-0.070.safetensors")
    assert np.allclose(made.params["unet.out_conv.weight"], PARAMS["unet.out_conv.weight"], rtol=2e-3, atol=2e-3)


class Evil:
    """What runs if a pickle is read as Python reads it."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def touch(path):
    return os.system, (f"touch {path}",)


def evils(marker):
    """(what is at ``ema``, the name that must be refused)."""
    blob = io.BytesIO()
    torch.save(Evil(*touch(marker)[:1], *touch(marker)[1]), blob, _use_new_zipfile_serialization=False)
    system = f"{os.system.__module__}.system"
    return {
        "at the top": (lambda: Evil(os.system, f"touch {marker}"), system),
        "in a state": (lambda: network(hook=Evil(os.system, f"touch {marker}")), system),
        "eval": (lambda: Evil(eval, f"open({str(marker)!r}, 'w')"), "builtins.eval"),
        "getattr": (lambda: Evil(getattr, "x", "upper"), "builtins.getattr"),
        "copyreg": (lambda: Evil(copyreg._reconstructor, dict, object, None), "copyreg._reconstructor"),
        "torch.load": (lambda: Evil(torch.load, str(marker)), "torch.serialization.load"),
        "a storage": (
            lambda: Evil(torch.storage._load_from_bytes, blob.getvalue()),
            "a storage that PyTorch did not write",
        ),
    }


@pytest.mark.parametrize("way", evils("x"))
def test_what_may_run_code_is_refused_by_name_and_does_not_run(tmp_path, way):
    marker = tmp_path / "ran"
    make, name = evils(marker)[way]
    path = write(tmp_path / NAME, make)
    with pytest.raises(InputError, match=name.replace(".", r"\.")) as caught:
        read_official(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not marker.exists()


def test_the_same_pickles_would_run_elsewhere(tmp_path):
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(Evil(os.system, f"touch {marker}")))
    assert marker.exists()


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x04\x8c\x0bcollections\x8c\x24OrderedDict.__init__.__globals__.get\x93)R.",  # dots that lead elsewhere
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
        b"(S'true'\nios\nsystem\n.",  # the first protocol
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x02X\x01\x00\x00\x00aQ.",  # a persistent id
        b"\x80\x02\x82\x01.",  # an extension's code
        b"(" * 100_000 + b"t" * 100_000 + b".",
        b"]" * 50_000 + b"a" * 49_999 + b".",
        b"hello",
        b"",
        b"}.",
    ],
)
def test_what_is_no_such_pickle_is_one_line(tmp_path, program):
    (tmp_path / NAME).write_bytes(program)
    with pytest.raises(InputError) as caught:
        read_official(tmp_path / NAME)
    assert NAME in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_number_of_an_object_beyond_what_precedes_it_is_refused_before_memory_is_taken_for_it(tmp_path):
    (tmp_path / NAME).write_bytes(b"\x80\x02Nr\xff\xff\xff\x0f.")
    with pytest.raises(InputError, match="object 268435455 in 3 bytes"):
        read_official(tmp_path / NAME)


def test_every_cut_is_refused(tmp_path):
    whole = write(tmp_path / NAME, network).read_bytes()
    for end in range(0, len(whole), len(whole) // 150):
        (tmp_path / NAME).write_bytes(whole[:end])
        with pytest.raises(InputError):
            read_official(tmp_path / NAME)


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [
        ((100,), (1,), 0),
        ((2, 2), (3, 2), 0),
        ((2,), (1,), 4),
        ((-1,), (1,), 0),
        ((3,), (0,), 0),
        ((1 << 40,), (0,), 0),
        ((2,), (1.5,), 0),
    ],
)
def test_a_tensor_that_sees_more_than_its_storage_is_refused(tmp_path, size, stride, offset):
    storage = torch.zeros(5).untyped_storage()
    if (size, stride) == ((3,), (0,)):  # within bounds: expanded; allowed, as it is no larger than its storage
        stride, size = (0,), (6,)

    def make():
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return Evil(torch._utils._rebuild_tensor_v2, typed, offset, size, stride, False, collections.OrderedDict())

    path = write(tmp_path / NAME, make)
    with pytest.raises(InputError, match="a tensor"):
        read_official(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: network(class_name="Unknown"), "a Precond, got Unknown"),
        (lambda: {"a": 1}, "a Precond, got a dict"),
        (lambda: network({n: a for n, a in PARAMS.items() if n != "unet.out_gain"}), r"unet\.out_gain is missing"),
        (lambda: network(img_resolution=7), "divisible by 2"),
        (lambda: network(img_resolution="8"), "a setting that is a str"),
        (lambda: network(img_channels=1), "must have shape"),
    ],
)
def test_what_is_no_edm2_network_is_refused(tmp_path, make, message):
    path = write(tmp_path / NAME, make)
    with pytest.raises(InputError, match=message) as caught:
        read_official(path)
    assert str(path) in str(caught.value)


def test_a_name_without_time_needs_to_be_told(tmp_path):
    path = write(tmp_path / "weights.pkl", network)
    with pytest.raises(InputError, match="add --nimg and --sigma-rel"):
        read_official(path, nimg=5)
    assert read_official(path, nimg=5, sigma_rel=0.1).nimg == 5


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match="must be a file that can be read, got 'No such file or directory'"):
        read_official(Path(tmp_path / NAME))
