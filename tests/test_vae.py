"""Decoders of latents, in every port, equal diffusers'; broken autoencoders are one line."""

import json
import shutil
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from backends.pipeline.checkpoints.autoencoder import local_folder, read_autoencoder
from backends.pipeline.checkpoints.safetensors_io import TensorFile, read_array, write_tensors
from edm2_core.errors import InputError

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers
WEIGHTS = "diffusion_pytorch_model.safetensors"
KINDS = {
    "usual": {"block_out_channels": (8, 16, 16)},
    "no attention, no convolution of latents": {
        "block_out_channels": (8,), "layers_per_block": 2, "mid_block_add_attention": False,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
}  # fmt: skip


def make(folder: Path, **changes: object) -> "diffusers.AutoencoderKL":
    torch.manual_seed(0)
    levels = len(changes.get("block_out_channels", (8, 16)))  # type: ignore[arg-type]
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    options = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, **blocks, **changes}
    vae = diffusers.AutoencoderKL(**options).eval()
    for parameter in vae.parameters():  # biases and norms are 0 and 1 at first
        torch.nn.init.normal_(parameter, std=0.3)
    vae.save_pretrained(folder)
    return vae


@pytest.mark.parametrize("port", ["torch", "jax", "mlx"])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_decoded_as_diffusers_does(tmp_path: Path, port: str, kind: str) -> None:
    pytest.importorskip({"mlx": "mlx.core"}.get(port, port))
    vae = make(tmp_path, **KINDS[kind])
    latents = np.random.default_rng(0).standard_normal((2, 4, 6, 4)).astype(np.float32)
    with torch.inference_mode():
        wanted = vae.decode(torch.from_numpy(latents)).sample.numpy()
    got = import_module(f"backends.{port}.vae").open_decoder(str(tmp_path))(latents)
    assert (got.shape, got.dtype) == (wanted.shape, np.float32)
    with pytest.raises(InputError, match="must decode its own latents, got 3 channels for 4: name theirs with --vae"):
        import_module(f"backends.{port}.vae").open_decoder(str(tmp_path))(latents[:, :3])
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_older_names_of_attention_are_read(tmp_path: Path) -> None:
    """Also where its layers are 1x1 convolutions."""
    make(tmp_path)
    before, older = (
        read_autoencoder(tmp_path),
        {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"},
    )
    file = TensorFile(tmp_path / WEIGHTS)
    arrays = {name: read_array(file, name) for name in file.entries}
    for new, old in older.items():
        for name in [name for name in arrays if f".attentions.0.{new}." in name]:
            array = arrays.pop(name)
            renamed = name.replace(f".{new}.", f".{old}.")
            arrays[renamed] = array[..., None, None] if array.ndim == 2 else array
    write_tensors(tmp_path / WEIGHTS, arrays, {})
    after = read_autoencoder(tmp_path)
    assert all(np.array_equal(array, after.arrays[name]) for name, array in before.arrays.items())


def test_moments_are_mean_and_standard_deviation(tmp_path: Path) -> None:
    from backends.torch.vae import open_encoder

    vae = make(tmp_path)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 8, 12)).astype(np.float32)
    with torch.inference_mode():
        wanted = vae.encode(torch.from_numpy(images)).latent_dist
    moments = open_encoder(str(tmp_path))(images)
    with pytest.raises(InputError, match="sides divisible by 2, got 12x7: convert them first"):
        open_encoder(str(tmp_path))(images[:, :, :7])
    np.testing.assert_allclose(moments, np.concatenate([wanted.mean, wanted.std], axis=1), rtol=1e-5, atol=1e-6)


def _changed_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _without(folder: Path, name: str) -> None:
    file = TensorFile(folder / WEIGHTS)
    write_tensors(folder / WEIGHTS, {n: read_array(file, n) for n in file.entries if n != name}, {})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json must be that of an AutoencoderKL"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json must be that of an AutoencoderKL"),
        (lambda f: _changed_config(f, act_fn="relu"), "silu and UpDecoderBlock2D, got 'relu and"),
        (lambda f: _changed_config(f, _class_name="VQModel"), "got 'the class VQModel'"),
        (lambda f: _changed_config(f, latent_channels=5), "must have shape .*, got .*: use its own config"),
        (lambda f: _changed_config(f, layers_per_block=2), "must have decoder.* got none"),
        (lambda f: (f / WEIGHTS).rename(f / "model.bin"), "got none in .*; .bin is a pickle, which is not read"),
        (lambda f: _without(f, "decoder.conv_out.bias"), r"must have decoder\.conv_out\.bias, got none"),
        (lambda f: (f / WEIGHTS).write_bytes(b"0" * 20), "safetensors"),
    ],
)
def test_a_broken_autoencoder_is_one_line(tmp_path: Path, break_it, message: str) -> None:
    make(tmp_path)
    break_it(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        read_autoencoder(local_folder(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_an_autoencoder_that_is_nowhere_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="an autoencoder must be a folder or an ID such as"):
        local_folder(str(tmp_path / "gone"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"nobody/nothing must be on (the hub|this machine)"):
        local_folder("nobody/nothing", only_local=True)


def test_the_folder_of_a_pipeline_has_its_autoencoder_inside(tmp_path: Path) -> None:
    make(tmp_path / "vae")
    assert local_folder(str(tmp_path)) == tmp_path / "vae"
    shutil.rmtree(tmp_path / "vae")
