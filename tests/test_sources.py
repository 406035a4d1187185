"""Folders of other tools: which files are weights, and which time they are of."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from backends.commands.cli import main
from backends.pipeline.checkpoints.described import Described
from backends.pipeline.checkpoints.file_times import named_times
from backends.pipeline.checkpoints.safetensors_io import TensorFile
from backends.pipeline.checkpoints.sources import open_sources
from edm2_core.ema import Length
from edm2_core.errors import InputError

RAW = (Length.raw(1),)


def save(path, value=1.0, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": np.full(2, value, np.float32)}, path, metadata=metadata)


def times(folder, **described):
    return [source.time for source in open_sources(folder, described=Described(lengths=RAW, **described))]


@pytest.mark.parametrize(
    ("names", "given", "pattern", "wanted"),
    [
        (["model-100", "model-200"], {}, "model-{time}", [100, 200]),
        ([f"step{100 * i:05d}_cat_512" for i in (1, 2, 10)], {}, "step{time}_cat_512", [100, 200, 1000]),
        (["cat_v2-000001", "cat_v2-000009"], {}, "cat_v2-{time}", [1, 9]),
        (["cat_v2-000001", "cat_v2-000009", "cat_v2"], {"last_time": 10}, "cat_v2-{time}", [1, 9, 10]),
        (
            ["epoch=0-step=400", "epoch=1-step=800"],
            {"pattern": "epoch=*-step={time}"},
            "epoch=*-step={time}",
            [400, 800],
        ),
        (["checkpoint-500/unet", "checkpoint-1000/unet"], {}, "checkpoint-{time}/unet", [500, 1000]),
        (["0-last"], {"pattern": "0-last", "last_time": 7}, "0-last", [7]),
        (["model_v2"], {"last_time": 300}, "model_v2", [300]),
        (["step1100_v", "step2100_v"], {"pattern": "*{time}_v"}, "*{time}_v", [1100, 2100]),
    ],
)
def test_the_time_is_the_number_that_differs_between_all_names(names, given, pattern, wanted):
    named = named_times(names, **{"pattern": None, "last_time": None} | given)
    assert named.pattern == pattern
    assert [named.times[name] for name in names] == wanted
    assert str(named) == f"times     in names like {pattern}: {min(wanted)} to {max(wanted)}"


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["cat_v2-000001", "cat_v2-000009", "cat_v2"], {}, "got cat_v2 besides: give --last-time if it is the last"),
        (["epoch=0-step=400", "epoch=1-step=800"], {}, r"'epoch={time}-step=\*' or 'epoch=\*-step={time}'.*--pattern"),
        (["model_512_v2"], {}, "'model_{time}_v2' or 'model_512_v{time}'"),
        (["a-1", "a-2", "b-1", "c-3"], {}, "got b-1, c-3 besides: give --pattern"),
        (["m_1_10", "m_2_10", "m_3_20"], {}, r"'m_{time}_\*' or 'm_\*_{time}'"),
        (["cat_v2"], {}, "where it may be 'cat_v{time}': give it with --pattern or --last-time"),
        (["m-1", "m-2"], {"last_time": 3}, "--last-time is for a name without time"),
        (["weights"], {}, "must show which number is the time, got weights: give it with --pattern"),
        (["a-1"], {"pattern": "{time}-{time}"}, "must have one {time}"),
    ],
)
def test_names_that_do_not_tell_the_time_are_refused(names, given, message):
    with pytest.raises(InputError, match=message):
        named_times(names, **{"pattern": None, "last_time": None} | given)


def test_the_pattern_is_shown_and_the_last_file_is_asked_about(tmp_path, capsys):
    for i in range(1, 10):
        save(tmp_path / f"cat_v2-{i:06d}.safetensors", i)
    save(tmp_path / "cat_v2.safetensors", 10)
    arguments = ["reconstruct", str(tmp_path), "--source-raw", "1", "--sigma-rels", "0.1"]
    assert main(arguments) == 2
    assert "got cat_v2 besides: give --last-time" in capsys.readouterr().err
    assert main([*arguments, "--last-time", "10"]) == 0
    out = capsys.readouterr().out
    assert out.index("times     in names like cat_v2-{time}: 1 to 10") < out.index("files     10, from time 1 to 10")


def test_metadata_comes_before_names_and_is_kept(tmp_path, capsys):
    for name, step in (("cat-000001", 150), ("cat-000002", 300), ("cat", 450)):
        save(tmp_path / f"{name}.safetensors", step, {"ss_steps": str(step), "ss_network_dim": "4", "other": "x"})
    assert times(tmp_path) == [150, 300, 450]
    assert main(["reconstruct", str(tmp_path), "--source-raw", "150", "--sigma-rels", "0.2"]) == 0
    (path,) = (tmp_path / "reconstructed").iterdir()
    metadata = TensorFile(path).metadata
    assert (metadata["ss_network_dim"], metadata["ss_steps"], "other" in metadata) == ("4", "450", False)


def test_times_are_never_partly_recorded_and_partly_named(tmp_path):
    for epoch in (1, 2):
        save(tmp_path / f"cat-00000{epoch}.safetensors", epoch, {"ss_steps": str(150 * epoch)})
    with pytest.raises(InputError, match="--last-time is for a file without a time, got 2 that record theirs"):
        times(tmp_path, last_time=3)
    save(tmp_path / "cat-000003.safetensors", 3)
    with pytest.raises(InputError, match=r"got cat-000003 beside 2, from 150 to 300: give --last-time.*or --pattern"):
        times(tmp_path)
    assert times(tmp_path, last_time=450) == [150, 300, 450]
    assert times(tmp_path, pattern="cat-{time}") == [1, 2, 3]


def test_equal_times_are_refused_and_a_pattern_comes_before_metadata(tmp_path):
    for epoch in (1, 2):  # steps that were counted anew
        save(tmp_path / f"cat-00000{epoch}.safetensors", epoch, {"ss_steps": "150"})
    with pytest.raises(InputError, match=r"times must differ, got 150 in \S+cat-000001\.safetensors, \S+cat-000002"):
        times(tmp_path)
    assert times(tmp_path, pattern="cat-{time}") == [1, 2]
    save(tmp_path / "cat-02.safetensors")
    with pytest.raises(InputError, match=r"times must differ, got 2 in"):
        times(tmp_path, pattern="cat-{time}")


def test_files_before_training_are_left_out(tmp_path):
    said = []
    for step in (0, 10):
        save(tmp_path / f"m-{step}.safetensors")
    (source,) = open_sources(tmp_path, described=Described(lengths=RAW), show=said.append)
    assert source.time == 10
    assert said[1] == "left out  m-0.safetensors: time 0 is before training, when nothing has been averaged"


def test_folders_of_checkpoints_are_found(tmp_path):
    for step in (500, 1000):
        save(tmp_path / f"checkpoint-{step}" / "model.safetensors", step)
        (tmp_path / f"checkpoint-{step}" / "optimizer.bin").write_bytes(b"x")
        (tmp_path / f"checkpoint-{step}" / "random_states_0.pkl").write_bytes(b"x")
    save(tmp_path / "reconstructed" / "000000001000-0.100.safetensors")  # an earlier output
    assert times(tmp_path) == [500, 1000]
    save(tmp_path / "model.safetensors", 1500)
    with pytest.raises(InputError, match=r"as in checkpoint-{time}, got model besides: give --last-time"):
        times(tmp_path)
    assert times(tmp_path, last_time=1500) == [500, 1000, 1500]


def test_one_of_several_files_in_a_checkpoint_is_chosen_by_the_pattern(tmp_path):
    for step in (500, 1000):
        for name in ("model", "model_1"):
            save(tmp_path / f"step_{step}" / f"{name}.safetensors", step)
    with pytest.raises(InputError, match=r"with --pattern 'step_{time}/model' or 'step_{time}/model_1'"):
        times(tmp_path)
    sources = open_sources(tmp_path, described=Described(lengths=RAW, pattern="step_{time}/model_1"))
    assert [(source.time, source.path.stem) for source in sources] == [(500, "model_1"), (1000, "model_1")]


def test_one_of_several_networks_in_a_checkpoint_is_chosen_by_the_pattern(tmp_path):
    for step in (500, 1000):
        for name in ("unet", "unet_ema"):
            save(tmp_path / f"checkpoint-{step}" / name / "diffusion_pytorch_model.safetensors", step)
    with pytest.raises(
        InputError, match=r"got 2, .*: choose one with --pattern 'checkpoint-{time}/unet' or .*/unet_ema'"
    ):
        times(tmp_path)
    sources = open_sources(tmp_path, described=Described(lengths=RAW, pattern="checkpoint-{time}/unet_ema"))
    assert [(source.time, source.path.parent.name) for source in sources] == [(500, "unet_ema"), (1000, "unet_ema")]


def test_weights_in_several_files_are_one(tmp_path):
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        for i, name in enumerate(("a", "b"), start=1):
            folder.mkdir(exist_ok=True)
            save_file({name: np.full(3, step * i, np.float32)}, folder / f"model-0000{i}-of-00002.safetensors")
        places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    first, last = open_sources(tmp_path, described=Described(lengths=RAW))
    assert (first.time, last.time) == (5, 10)
    assert {name: array.tolist() for name, array in last.load().params.items()} == {"a": [10] * 3, "b": [20] * 3}
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(InputError, match=r"gone\.safetensors must be a file that can be read"):
        times(tmp_path)


def test_files_of_several_kinds_are_refused_and_states_of_training_left_aside(tmp_path):
    for step in (1, 2):
        save(tmp_path / f"model-{step}.safetensors")
    (tmp_path / "training-state-0000001.pt").write_bytes(b"x")
    assert times(tmp_path) == [1, 2]
    (tmp_path / "model-3.ckpt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"of one kind, got 1 \.ckpt and 2 \.safetensors"):
        times(tmp_path)


def test_checkpoints_of_lightning_and_plain_weights_are_read(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for epoch in (0, 1):
        state = {"state_dict": {"w": torch.full((2,), float(epoch))}, "global_step": 400 * (epoch + 1), "epoch": epoch}
        state |= {"callbacks": {}, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}]}
        (tmp_path / "pl").mkdir(exist_ok=True)
        torch.save(state, tmp_path / "pl" / f"epoch={epoch}-step={400 * (epoch + 1)}.ckpt")
        (tmp_path / "plain").mkdir(exist_ok=True)
        torch.save({"w": torch.full((2,), float(epoch))}, tmp_path / "plain" / f"w_{epoch + 1}.pt")
    assert times(tmp_path / "pl") == [400, 800]
    assert times(tmp_path / "plain") == [1, 2]
    torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.ones(2)}}, tmp_path / "plain" / "w_3.pt")
    with pytest.raises(InputError, match="must hold one dict of tensors, got ema, model"):
        times(tmp_path / "plain")


def test_weights_are_never_taken_for_others(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    states = {
        "got loss, model": {"model": {"w": torch.ones(2)}, "loss": torch.tensor(0.1)},
        "got epoch, path": {"epoch": 1, "path": "x"},
        "got torch.complex64 in w: convert it": {"w": torch.ones(2, dtype=torch.complex64)},
    }
    for message, state in states.items():
        torch.save(state, tmp_path / "m-1.pt")
        with pytest.raises(InputError, match=message):
            times(tmp_path, pattern="m-{time}")
    whole = {"w": torch.nn.Parameter(torch.ones(2, 3).T), "n": torch.ones(2, dtype=torch.int16)}
    torch.save(whole, tmp_path / "m-1.pt")
    (source,) = open_sources(tmp_path, described=Described(lengths=RAW, pattern="m-{time}"))
    assert {name: array.shape for name, array in source.load().params.items()} == {"w": (3, 2), "n": (2,)}


def test_weights_of_pytorch_in_several_files_are_one(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        places = {name: f"pytorch_model-0000{i}-of-00002.bin" for i, name in enumerate(("a", "b"), start=1)}
        for name, place in places.items():
            torch.save({name: torch.full((2,), float(step))}, folder / place)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    first, last = open_sources(tmp_path, described=Described(lengths=RAW))
    assert (first.time, {name: array.tolist() for name, array in last.load().params.items()}) == (
        5,
        {"a": [10, 10], "b": [10, 10]},
    )


def test_averages_that_nothing_can_be_made_of_are_left_out_by_name(tmp_path, capsys):
    """ema-pytorch's own settings: sigma_rels 0.05 and 0.28, an update every 10 steps."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for index in (0, 1):
        for step in (10, 100, 1000):
            state = {"ema_model.w": torch.full((2,), 1.0), "initted": torch.tensor(True), "step": torch.tensor(step)}
            torch.save(state, tmp_path / f"{index}.{step}.pt")
    options = ["--source-sigma-rels", "0.05", "0.28", "--source-update-every", "10", "--sigma-rels", "0.15"]
    assert main(["reconstruct", str(tmp_path), *options]) == 0
    out = capsys.readouterr().out
    assert "left out  1.10.pt, 1.100.pt, 1.1000.pt: lengths must be within (0, 0.2887), got more" in out
    assert "files     3, from time 10 to 1000" in out
    assert len(list((tmp_path / "reconstructed").glob("*.safetensors"))) == 1
