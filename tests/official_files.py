"""Files as the official training loop writes them, for tests."""

import pickle
import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest

from edm2_core.codec import SD_LATENTS
from edm2_core.network import NetworkConfig, initialize

torch = pytest.importorskip("torch", reason="official pickles hold PyTorch's storages")

NAME = "edm2-test-xs-0016777-0.050.pkl"
CONFIG = NetworkConfig(
    img_resolution=8,
    img_channels=3,
    label_dim=5,
    model_channels=8,
    channel_mult=(1, 2),
    num_blocks=1,
    attn_resolutions=(4,),
    channels_per_head=4,
    logvar_channels=6,
    dropout=0.1,
)
PARAMS = initialize(CONFIG, seed=3)


@contextmanager
def official_modules():
    """Modules of the names that official pickles refer to, while one is written."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("executed")

    class EasyDict(dict):
        def __getattr__(self, name):
            try:
                return self[name]
            except KeyError:
                raise AttributeError(name) from None

        def __setattr__(self, name, value):
            self[name] = value

    _reconstruct_persistent_obj.__module__, EasyDict.__module__ = persistence.__name__, util.__name__
    _reconstruct_persistent_obj.__qualname__, EasyDict.__qualname__ = "_reconstruct_persistent_obj", "EasyDict"
    persistence._reconstruct_persistent_obj, util.EasyDict = _reconstruct_persistent_obj, EasyDict
    fakes = {"torch_utils": types.ModuleType("torch_utils"), "torch_utils.persistence": persistence}
    fakes |= {"dnnlib": types.ModuleType("dnnlib"), "dnnlib.util": util}
    sys.modules.update(fakes)
    try:
        yield persistence, util
    finally:
        for name in fakes:
            del sys.modules[name]


def network(params=PARAMS, config=CONFIG, dtype=torch.float32, class_name="Precond", **attributes):
    """Nested modules with these parameters that pickle as the official network does."""
    persistence, util = sys.modules["torch_utils.persistence"], sys.modules["dnnlib.util"]

    class Persistent(torch.nn.Module):
        class_name = "MPConv"

        def __reduce__(self):
            meta = util.EasyDict(type="class", version=6, module_src="raise SystemExit", class_name=self.class_name)
            meta.state = self.__dict__
            return persistence._reconstruct_persistent_obj, (meta,), None

    def put(module, path, array):
        first, _, rest = path.partition(".")
        if rest:
            if first not in module._modules:
                module.add_module(first, torch.nn.ModuleDict() if first in ("enc", "dec") else Persistent())
            put(module._modules[first], rest, array)
        elif path.endswith(("freqs", "phases")):
            module.register_buffer(path, torch.from_numpy(array))
        else:
            module.register_parameter(path, torch.nn.Parameter(torch.from_numpy(array).to(dtype)))

    top = Persistent()
    top.class_name = class_name
    for name, array in params.items():
        put(top, name, array)
    top.img_resolution, top.img_channels, top.label_dim = config.img_resolution, config.img_channels, config.label_dim
    top.sigma_data, top.use_fp16 = config.sigma_data, True
    top._init_kwargs = util.EasyDict(use_fp16=True, logvar_channels=config.logvar_channels)
    unet = top._modules["unet"]
    unet.class_name = "UNet"
    names = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "channels_per_head", "dropout")
    unet._init_kwargs = util.EasyDict({name: getattr(config, name) for name in names}, unknown_option=3)
    for name, value in attributes.items():
        setattr(top, name, value)
    return top


def thing(class_name, **state):
    """An object that pickles as the official encoders and losses do."""
    persistence, util = sys.modules["torch_utils.persistence"], sys.modules["dnnlib.util"]

    class Persistent:
        def __reduce__(self):
            meta = util.EasyDict(type="class", version=6, module_src="raise SystemExit", class_name=class_name)
            meta.state = state
            return persistence._reconstruct_persistent_obj, (meta,), None

    return Persistent()


def pixels():
    return thing("StandardRGBEncoder", _init_args=(), _init_kwargs=sys.modules["dnnlib.util"].EasyDict())


def latents():
    """As of a run on latents: x = value * scale + bias, arrays of NumPy."""
    mean, std = (np.float32(values) for values in SD_LATENTS)
    scale = np.float32(0.5) / std
    return thing(
        "StabilityVAEEncoder",
        _init_args=(),
        _init_kwargs=sys.modules["dnnlib.util"].EasyDict(vae_name="stabilityai/sd-vae-ft-mse"),
        vae_name="stabilityai/sd-vae-ft-mse",
        batch_size=8,
        _vae=None,
        scale=scale,
        bias=np.float32(0) - mean * scale,
    )


def write(path, make, *, encoder=pixels, protocol=None, **others):
    """A file as the official training loop writes it, with what ``make`` returns called ema."""
    with official_modules() as (_, util), open(path, "wb") as file:
        options = util.EasyDict(class_name="training.dataset.ImageFolderDataset", path="x.zip", use_labels=True)
        loss = thing("EDM2Loss", P_mean=-0.4, P_std=1.0, sigma_data=0.5, _init_args=(), _init_kwargs=util.EasyDict())
        content = {"ema": make(), "encoder": encoder(), "dataset_kwargs": options, "loss_fn": loss, **others}
        pickle.dump(content, file, protocol)
    return path
