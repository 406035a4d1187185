"""Training that starts from another network takes what fits and names the rest."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from toy_port import PRESET, ToySampler, ToyTrainer, config_of, run_toy

from backends.pipeline.checkpoints.snapshots import Snapshot, save_snapshot
from backends.pipeline.data.batches import stored_batch
from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.runs.initial import initial
from backends.ports import Machine
from edm2_core.ema import Length
from edm2_core.errors import InputError
from edm2_core.mp import force_weight_norm
from edm2_core.network import initialize, plan

pytestmark = pytest.mark.usefixtures("toy")


def stored(**changes):
    """A snapshot of a trained network, whose arrays are 2 wherever they are trained."""
    network = replace(PRESET.network, **changes)
    table = plan(network).parameters
    params = {n: np.full_like(a, 2) if table[n].trained else a for n, a in initialize(network, seed=9).items()}
    save_snapshot("other.safetensors", Snapshot(params=params, config=network, nimg=64, length=Length.of(0.1)))
    return params


def test_arrays_of_the_same_shape_are_taken_and_the_others_are_fresh():
    stored(label_dim=3)
    config = config_of(preset="toy", data="digits", init="other.safetensors")
    begin, fresh = initial(config), initialize(config.network, seed=0)
    assert begin.fresh == ("unet.emb_label.weight",)
    assert np.array_equal(begin.params["unet.emb_label.weight"], fresh["unet.emb_label.weight"])
    trained = [n for n, p in plan(config.network).parameters.items() if p.trained and n not in begin.fresh]
    assert all((begin.params[name] == 2).all() for name in trained)


def test_blocks_of_another_resolution_correspond_by_level():
    stored(img_resolution=(16, 8), attn_resolutions=(8,))
    begin = initial(config_of(preset="toy", data="digits", init="other.safetensors"))
    assert (begin.fresh, begin.unused) == ((), ())
    assert (begin.params["unet.dec.4x4_block0.conv_res0.weight"] == 2).all()


def test_a_run_starts_from_it_with_a_clock_of_its_own_and_goes_on_without_it(tmp_path, capsys):
    stored()
    trainers = []

    class Kept(ToyTrainer):
        def load_state(self, state, /):
            super().load_state(state)
            trainers.append((state.nimg, float(state.params["unet.out_conv.weight"].mean())))

    options = {"preset": "toy", "data": "digits", "duration": 128}
    assert run_toy(Kept, ToySampler(), init="other.safetensors", outdir="run", **options) == 0
    assert trainers[-1] == (0, 2.0)
    said = capsys.readouterr().out
    assert "start    " in said
    assert "fresh" not in said
    (tmp_path / "other.safetensors").unlink(missing_ok=True)
    assert run_toy(Kept, ToySampler(), outdir="run", duration=256) == 0
    assert trainers[-1][0] == 128


def test_a_network_of_which_nothing_fits_is_refused():
    stored(model_channels=8, channels_per_head=8, logvar_channels=8)
    config = config_of(preset="toy", data="digits", init="other.safetensors")
    with pytest.raises(InputError, match="--init must be a network like the one to train, got none of its weights in"):
        initial(config)
    with pytest.raises(InputError, match="gone"):
        initial(replace(config, init="gone.safetensors"))


@pytest.mark.parametrize("port", ["torch", "jax", "mlx"])
def test_only_the_weights_that_are_named_are_trained(port):
    """The others are the first ones, forced onto their spheres; a state and averages have them too."""
    pytest.importorskip({"mlx": "mlx.core"}.get(port, port))
    config = config_of(preset="toy", data="digits", train=("unet.dec.*", "unet.out_gain"), batch=16)
    names = {"torch": "TorchTrainer", "jax": "JaxTrainer", "mlx": "MLXTrainer"}
    trainer = getattr(import_module(f"backends.{port}.trainer"), names[port])(config, Machine(device="cpu"))
    for _ in range(4):  # gains are 0 at first, and so are the gradients behind them
        trainer.step(trainer.place(stored_batch(open_dataset("digits"), np.arange(16))), lr=0.01)
    first, table, state = initialize(config.network, seed=0), plan(config.network).parameters, trainer.state()
    for name, array in first.items():
        forced = force_weight_norm(array.astype(np.float64)) if table[name].normalized else array
        stays = np.allclose(state.params[name], forced, rtol=0, atol=1e-3)  # forcing again moves by eps
        assert stays == (not name.startswith("unet.dec.") and name != "unet.out_gain"), name
    assert state.moments1.keys() == {name for name in first if table[name].trained}


def test_a_pattern_that_names_no_weight_is_refused():
    with pytest.raises(InputError, match=r"--train must match names of weights, .*got 'unet\.decoder"):
        config_of(preset="toy", data="digits", train=("unet.decoder.*",))
    with pytest.raises(InputError, match=r"must match unet\.out_gain of a fresh network"):
        config_of(preset="toy", data="digits", train=("unet.dec.*",))
