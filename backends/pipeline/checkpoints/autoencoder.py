"""Autoencoders of Stable Diffusion's kind (diffusers' AutoencoderKL): their files, and their decoder in any framework.

A folder in diffusers' layout has config.json and diffusion_pytorch_model.safetensors. :func:`decode` is the decoder
over the few operations that a framework provides, so ports do not differ in its structure.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edm2_core.errors import InputError
from edm2_core.json_text import parse_json

from .hub import SCHEME, Address, hub_folder
from .safetensors_io import TensorFile, read_array

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names of attention layers
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The fields of diffusers' config.json that the decoder depends on, with its defaults."""

    latent_channels: int = 4
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    act_fn: str = "silu"
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    @property
    def scale(self) -> int:
        """How many times an image is as high and wide as its latent."""
        return 1 << len(self.block_out_channels) - 1

    def check_latents(self, latents: np.ndarray, /) -> None:
        """Raise InputError unless ``latents`` [N, C, h, w] have the channels that the decoder takes."""
        if latents.shape[1] != self.latent_channels:
            raise InputError(
                f"an autoencoder must decode its own latents, got {latents.shape[1]} channels for "
                f"{self.latent_channels}: name theirs with --vae"
            )

    def check_images(self, images: np.ndarray, /) -> None:
        """Raise InputError unless ``images`` [N, 3, H, W] have sides that the encoder divides evenly."""
        height, width = images.shape[2:]
        if height % self.scale or width % self.scale:
            raise InputError(
                f"images to encode must have sides divisible by {self.scale}, got {width}x{height}: convert them first"
            )


@dataclass(frozen=True)
class Autoencoder:
    """The decoder of an autoencoder: its config, and its arrays by diffusers' names, float32."""

    config: AutoencoderConfig
    arrays: Mapping[str, np.ndarray]


def local_folder(name: str, /, *, only_local: bool = False) -> Path:
    """The folder of an autoencoder: a path; an ID of the Hugging Face hub, or hf://ID or hf://ID/FOLDER, which is
    downloaded if it is not cached.

    Raises:
        InputError: neither a folder nor an ID; the hub's package is missing, or it does not answer.
    """
    path, instead = Path(name), "give its folder with --vae"
    if name.startswith(SCHEME):
        at = Address.of(name)
        files = [f"{at.path}/{file}".lstrip("/") for file in ("config.json", _WEIGHTS[0])]
        return hub_folder(at.repo, files, instead=instead, only_local=only_local, revision=at.revision) / at.path
    if path.is_dir():
        inner = path / "vae"
        return inner if not (path / "config.json").exists() and inner.is_dir() else path
    if path.is_absolute() or name.count("/") != 1:
        raise InputError(f"an autoencoder must be a folder or an ID such as stabilityai/sd-vae-ft-mse, got {name!r}")
    return hub_folder(name, ["config.json", _WEIGHTS[0]], instead=instead, only_local=only_local)


def read_autoencoder(folder: Path, /) -> Autoencoder:
    """The decoder in a folder.

    Raises:
        InputError: no such files, pickles instead, another architecture, or arrays that do not fit the config.
    """
    config = _config(folder / "config.json")
    path = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if path is None:
        pickles = "; .bin is a pickle, which is not read" if any(folder.glob("*.bin")) else ""
        raise InputError(f"an autoencoder must have {_WEIGHTS[0]}, got none in {folder}{pickles}: convert it")
    file, wanted = TensorFile(path), _shapes(config)
    stored = {_newer(name): name for name in file.entries}
    arrays = {}
    for name, shape in wanted.items():
        if name not in stored:
            raise InputError(f"{path} must have {name}, got none: its config.json is of another autoencoder")
        array = read_array(file, stored[name]).astype(np.float32)
        if array.size != np.prod(shape) or array.shape[0] != shape[0]:
            raise InputError(f"{name} must have shape {shape}, got {array.shape} in {path}: use its own config.json")
        arrays[name] = array.reshape(shape)  # older attention layers are 1x1 convolutions
    return Autoencoder(config, arrays)


def _newer(name: str) -> str:
    if ".attentions." not in name:
        return name
    head, _, part = name.rpartition(".")
    layer = head.rpartition(".")[2]
    return f"{head.removesuffix(layer)}{_OLDER.get(layer, layer)}.{part}"


def _config(path: Path) -> AutoencoderConfig:
    try:
        values: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        names = [field.name for field in fields(AutoencoderConfig) if field.name in values]
        known: dict[str, Any] = {n: tuple(v) if isinstance(v := values[n], list) else v for n in names}
        config = AutoencoderConfig(**known)
        if values.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise ValueError(f"the class {values['_class_name']}")
        if config.act_fn != "silu" or set(config.up_block_types) != {"UpDecoderBlock2D"}:
            raise ValueError(f"{config.act_fn} and {', '.join(config.up_block_types)}")
        _shapes(config)
    except (OSError, ValueError, TypeError, AttributeError, IndexError) as error:
        why = " ".join(str(error).split())
        raise InputError(
            f"{path} must be that of an AutoencoderKL with silu and UpDecoderBlock2D, got '{why}': choose another"
        ) from error
    return config


Shapes = dict[str, tuple[int, ...]]


def _shapes(config: AutoencoderConfig) -> Shapes:
    """The arrays of the decoder, by name."""
    widths, shapes = config.block_out_channels[::-1], Shapes()

    def conv(name: str, cin: int, cout: int, size: int) -> None:
        shapes.update({f"{name}.weight": (cout, cin, size, size), f"{name}.bias": (cout,)})

    def norm(name: str, channels: int) -> None:
        shapes.update({f"{name}.weight": (channels,), f"{name}.bias": (channels,)})

    def resnet(name: str, cin: int, cout: int) -> None:
        norm(f"{name}.norm1", cin)
        conv(f"{name}.conv1", cin, cout, 3)
        norm(f"{name}.norm2", cout)
        conv(f"{name}.conv2", cout, cout, 3)
        if cin != cout:
            conv(f"{name}.conv_shortcut", cin, cout, 1)

    if config.use_post_quant_conv:
        conv("post_quant_conv", config.latent_channels, config.latent_channels, 1)
    conv("decoder.conv_in", config.latent_channels, widths[0], 3)
    for i in range(2):
        resnet(f"decoder.mid_block.resnets.{i}", widths[0], widths[0])
    if config.mid_block_add_attention:
        at = "decoder.mid_block.attentions.0"
        norm(f"{at}.group_norm", widths[0])
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes.update({f"{at}.{part}.weight": (widths[0], widths[0]), f"{at}.{part}.bias": (widths[0],)})
    before = widths[0]
    for level, width in enumerate(widths):
        for i in range(config.layers_per_block + 1):
            resnet(f"decoder.up_blocks.{level}.resnets.{i}", before if i == 0 else width, width)
        if level + 1 < len(widths):
            conv(f"decoder.up_blocks.{level}.upsamplers.0.conv", width, width, 3)
        before = width
    norm("decoder.conv_norm_out", widths[-1])
    conv("decoder.conv_out", widths[-1], config.out_channels, 3)
    return shapes


# ---- the decoder


class Operations(Protocol):
    """What a framework provides, on its own arrays [N, H, W, C]; layers are named, their arrays are the framework's."""

    def conv(self, name: str, x: Any, /) -> Any:
        """A convolution that keeps the size, with bias."""

    def linear(self, name: str, x: Any, /) -> Any:
        """A linear layer of the last axis, with bias."""

    def norm(self, name: str, x: Any, /) -> Any:
        """A group norm over pixels and groups of channels, with scale and bias; eps is :data:`EPS`."""

    def silu(self, x: Any, /) -> Any: ...

    def attend(self, q: Any, k: Any, v: Any, /) -> Any:
        """Softmax attention of [N, pixels, C], one head, logits divided by sqrt(C)."""

    def double(self, x: Any, /) -> Any:
        """Each pixel twice, in both directions."""


def decode(config: AutoencoderConfig, run: Operations, z: Any, /) -> Any:
    """Latents [N, h, w, latent_channels], in the autoencoder's own units, to images [N, scale h, scale w,
    out_channels], nominally from -1 to 1.

    Source: arXiv 2112.10752 Appendix E, with the names of diffusers.
    """
    x = run.conv("post_quant_conv", z) if config.use_post_quant_conv else z
    x = _resnet(run, "decoder.mid_block.resnets.0", run.conv("decoder.conv_in", x))
    if config.mid_block_add_attention:
        x = x + _attention(run, "decoder.mid_block.attentions.0", x)
    x = _resnet(run, "decoder.mid_block.resnets.1", x)
    widths = config.block_out_channels[::-1]
    for level in range(len(widths)):
        at = f"decoder.up_blocks.{level}"
        for i in range(config.layers_per_block + 1):
            narrows = i == 0 and level > 0 and widths[level - 1] != widths[level]
            x = _resnet(run, f"{at}.resnets.{i}", x, shortcut=narrows)
        if level + 1 < len(widths):
            x = run.conv(f"{at}.upsamplers.0.conv", run.double(x))
    return run.conv("decoder.conv_out", run.silu(run.norm("decoder.conv_norm_out", x)))


def _resnet(run: Operations, name: str, x: Any, *, shortcut: bool = False) -> Any:
    y = run.conv(f"{name}.conv1", run.silu(run.norm(f"{name}.norm1", x)))
    y = run.conv(f"{name}.conv2", run.silu(run.norm(f"{name}.norm2", y)))
    return y + (run.conv(f"{name}.conv_shortcut", x) if shortcut else x)


def _attention(run: Operations, name: str, x: Any) -> Any:
    n, height, width, channels = x.shape
    y = run.norm(f"{name}.group_norm", x).reshape(n, height * width, channels)
    y = run.attend(*(run.linear(f"{name}.{part}", y) for part in ("to_q", "to_k", "to_v")))
    return run.linear(f"{name}.to_out.0", y).reshape(n, height, width, channels)
