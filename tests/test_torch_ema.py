"""PowerEMA follows any module, and its snapshots give back any length."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from backends.torch.ema import PowerEMA, reconstruct
from edm2_core.ema import Length, beta
from edm2_core.errors import InputError


def make_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def walk(module: nn.Module, draw: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)


def test_update_is_the_recursion_of_the_specification() -> None:
    module, draw = make_module(), torch.Generator().manual_seed(0)
    ema = PowerEMA(module, sigma_rels=(0.1,))
    expected = None
    for step in range(1, 20):
        walk(module, draw)
        ema.update(time=step * 3, delta=3)
        weight = module[0].weight.detach()
        stay = beta(0.1, t_next=step * 3, t_delta=3)
        expected = weight.clone() if expected is None else stay * expected + (1 - stay) * weight
    torch.testing.assert_close(ema.arrays(0.1)["0.weight"], expected)


def test_the_first_update_copies() -> None:
    module = make_module()
    ema = PowerEMA(module)
    walk(module, torch.Generator().manual_seed(0))
    ema.update(time=7, delta=7)
    assert all(torch.equal(ema.arrays(0.05)[name], p) for name, p in module.named_parameters())


def test_reconstruction_loads_into_the_module_and_follows_the_tracked_length(tmp_path: Path) -> None:
    module, draw = make_module(), torch.Generator().manual_seed(0)
    stored, truth = PowerEMA(module), PowerEMA(module, sigma_rels=(0.15,))
    for step in range(1, 3201):
        walk(module, draw)
        stored.update(time=step * 10, delta=10)
        truth.update(time=step * 10, delta=10)
        if step % 400 == 0:
            stored.save(tmp_path)
    got = reconstruct(tmp_path, sigma_rel=0.15)
    module.load_state_dict(got)
    for name, parameter in truth.averages[Length.of(0.15)].items():
        error = (got[name] - parameter).norm() / (parameter - stored.averages[Length.of(0.05)][name]).norm()
        assert error < 0.15, name  # far nearer than what was stored


def test_the_module_is_untouched_and_buffers_are_kept() -> None:
    module = make_module()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ema = PowerEMA(module)
    ema.update(time=1, delta=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert ema.arrays(0.05).keys() == module.state_dict().keys()


def test_counters_are_kept_as_they_are_and_the_latest_counts(tmp_path: Path) -> None:
    module = make_module()
    ema = PowerEMA(module)
    for step in (1, 2, 3):
        module(torch.randn(5, 4))  # moves the counter of BatchNorm
        ema.update(time=step, delta=1)
        ema.save(tmp_path)
    counter = reconstruct(tmp_path, sigma_rel=0.15)["1.num_batches_tracked"]
    assert counter.dtype == torch.int64
    assert counter == 3


def test_state_goes_through_a_file_without_pickled_code(tmp_path: Path) -> None:
    module, draw = make_module(), torch.Generator().manual_seed(0)
    ema, other = PowerEMA(module), PowerEMA(make_module())
    for step in range(1, 4):
        walk(module, draw)
        ema.update(time=step, delta=1)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    other.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    assert other.time == ema.time
    assert all(torch.equal(other.arrays(0.1)[n], t) for n, t in ema.averages[Length.of(0.1)].items())


@pytest.mark.parametrize("lengths", [(), (0.0,), (0.3,), (-0.1,)])
def test_impossible_lengths_are_refused(lengths: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="sigma_rel"):
        PowerEMA(make_module(), sigma_rels=lengths)


def test_a_state_of_other_lengths_is_refused_and_changes_nothing() -> None:
    ema = PowerEMA(make_module())
    state = PowerEMA(make_module(), sigma_rels=(0.2,)).state_dict()
    before = {n: t.clone() for n, t in ema.averages[Length.of(0.05)].items()}
    with pytest.raises(InputError, match="same lengths"):
        ema.load_state_dict(state)
    assert all(torch.equal(before[n], t) for n, t in ema.averages[Length.of(0.05)].items())


def test_low_precision_weights_are_averaged_in_float32() -> None:
    module = nn.Linear(3, 3).to(torch.bfloat16)
    ema = PowerEMA(module)
    ema.update(time=1, delta=1)
    assert {t.dtype for t in ema.averages[Length.of(0.05)].values()} == {torch.float32}


def test_only_what_trains_can_be_kept_as_of_a_lora(tmp_path: Path) -> None:
    module = make_module()
    module[0].requires_grad_(False)
    ema = PowerEMA(module, trainable_only=True)
    ema.update(time=1, delta=1)
    ema.save(tmp_path)
    assert set(ema.arrays(0.05)) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert set(reconstruct(tmp_path, sigma_rel=0.05)) == set(ema.arrays(0.05))


def test_stopping_and_going_on_is_not_stopping() -> None:
    for dtype in (None, torch.bfloat16):
        module, draw = make_module(), torch.Generator().manual_seed(0)
        whole, first = PowerEMA(module, dtype=dtype), PowerEMA(module, dtype=dtype)
        for step in range(1, 9):
            walk(module, draw)
            whole.update(time=step, delta=1)
            if step == 4:
                other = PowerEMA(make_module(), dtype=dtype)
                other.load_state_dict(first.state_dict())
                first.load_state_dict(other.state_dict())
            first.update(time=step, delta=1)
        for name, average in whole.averages[Length.of(0.05)].items():
            assert torch.equal(average, first.averages[Length.of(0.05)][name])


def test_bfloat16_averages_follow_float32_ones() -> None:
    """Rounding to nearest would stop them: the change of an update is far below bfloat16's last bit."""
    module = nn.Linear(64, 64, bias=False)
    narrow, wide = PowerEMA(module, dtype=torch.bfloat16), PowerEMA(module)
    with torch.no_grad():
        module.weight.fill_(1.0)
    for ema in (narrow, wide):
        ema.update(time=1000, delta=1000)
    with torch.no_grad():
        module.weight.fill_(1.5)
    for time in range(1001, 11001):
        for ema in (narrow, wide):
            ema.update(time=time, delta=1)
        if time % 1000 == 0:
            true, mean = (float(ema.arrays(0.1)["weight"].float().mean()) for ema in (wide, narrow))
            assert abs(mean - true) < 2e-3  # 4096 weights' mean
    nearest = torch.tensor(1.0, dtype=torch.bfloat16)
    for _ in range(1000):
        nearest = torch.lerp(nearest.float(), torch.tensor(1.5), 1e-3).to(torch.bfloat16)
    assert nearest == 1  # so it stands still without


def test_evaluation_with_an_average_changes_what_is_computed_and_nothing_after() -> None:
    module, x = make_module().eval(), torch.ones(3, 4)
    ema = PowerEMA(module)
    ema.update(time=1, delta=1)
    walk(module, torch.Generator().manual_seed(0))
    before = {name: t.clone() for name, t in module.state_dict().items()}
    live = module(x)

    def evaluate_and_fail() -> None:
        with ema.applied(0.05, module):
            assert not torch.equal(module(x), live)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate_and_fail()
    assert torch.equal(module(x), live)
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


def test_a_parameter_that_is_added_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    ema = PowerEMA(module)
    ema.update(time=1, delta=1)
    module.add_module("late", nn.Linear(2, 2, bias=False))
    with pytest.raises(InputError, match=r"got another, late\.weight: construct it after parameters are added"):
        ema.update(time=2, delta=1)
    assert ema.time == 1


def test_a_replaced_parameter_is_refused_by_name() -> None:
    module = make_module()
    ema = PowerEMA(module)
    module[2].weight = nn.Parameter(torch.zeros(2, 8))
    with pytest.raises(InputError, match=r"parameters must stay the tensors .* got another for 2\.weight"):
        ema.update(time=1, delta=1)


def test_parameters_that_the_state_dict_leaves_out_are_averaged_too() -> None:
    class Shortened(nn.Linear):
        def state_dict(self, *args: object, **options: object) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {"weight": self.weight}

    module = Shortened(2, 2)
    ema = PowerEMA(module)
    walk(module, torch.Generator().manual_seed(0))
    ema.update(time=1, delta=1)
    assert torch.equal(ema.averages[Length.of(0.05)]["bias"], module.bias)


def test_what_is_reconstructed_loads_into_a_module_wrapped_in_any_way(tmp_path: Path) -> None:
    module = make_module()
    ema = PowerEMA(module)
    ema.update(time=1, delta=1)
    ema.save(tmp_path)
    module[0] = torch.compile(module[0], backend="eager")  # a part of it, and then the whole
    for model in (module, torch.compile(module, backend="eager")):
        model.load_state_dict(reconstruct(tmp_path, sigma_rel=0.05, like=model))
        assert set(PowerEMA(model).arrays(0.05)) == set(ema.arrays(0.05))
    with pytest.raises(InputError, match=r"like must have .* of shape .*, got none: give the module"):
        reconstruct(tmp_path, sigma_rel=0.05, like=nn.Linear(4, 8))


SHARDED = """
import os
import sys
from pathlib import Path
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from backends.torch.ema import PowerEMA, reconstruct
from edm2_core.errors import InputError

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))

def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))  # rows that two processes share unevenly

whole, sharded = made(), made()
for layer in (*sharded, sharded):
    fully_shard(layer, mesh=mesh)
trackers = [(whole, PowerEMA(whole), folder / f"whole{rank}"), (sharded, PowerEMA(sharded), folder / "sharded")]
for step in range(1, 7):
    for module, ema, outdir in trackers:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.25).add_(0.1 * step)
        ema.update(time=10 * step, delta=10)
        assert [path.parent for path in ema.save(outdir)] == [outdir] * 2
        if step == 3:
            again = PowerEMA(module)
            again.load_state_dict(ema.state_dict())
            ema.load_state_dict(again.state_dict())
distributed.barrier()
for length in (0.05, 0.07):
    got, wanted = reconstruct(folder / "sharded", sigma_rel=length), reconstruct(trackers[0][2], sigma_rel=length)
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    sharded.load_state_dict(reconstruct(folder / "sharded", sigma_rel=length, like=sharded))
    for name, parameter in sharded.named_parameters():
        assert torch.equal(parameter.full_tensor(), wanted[name])
with trackers[1][1].applied(0.05, sharded):
    assert torch.equal(sharded[0].weight.full_tensor(), trackers[1][1].arrays(0.05)["0.weight"].full_tensor())
try:
    trackers[1][1].save(folder / "meet")  # a file, not a folder
except InputError as error:
    print("refused", rank)
sys.stdout.flush()
os._exit(0)  # while Python is taken down, a thread of gloo's aborts the process at times
"""


def test_averages_of_a_sharded_module_are_those_of_the_whole_bit_for_bit(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHARDED, str(tmp_path)]
    workers = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in (0, 1)]
    said = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert said == ["refused 0\n", "refused 1\n"]
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole0", "sharded"))
    assert one == other


def test_wrappers_change_no_name() -> None:
    class Wrapped(nn.Module):  # as DistributedDataParallel does it
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    plain = set(PowerEMA(make_module()).arrays(0.05))
    compiled = torch.compile(make_module(), backend="eager")
    assert set(PowerEMA(compiled).arrays(0.05)) == plain
    assert set(PowerEMA(Wrapped(make_module())).arrays(0.05)) == plain
