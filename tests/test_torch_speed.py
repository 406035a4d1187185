"""What makes the PyTorch port fast changes no result: layouts, compiled parts, padded batches, recomputation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_torch_step import distance, make_batch, make_network, train
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from backends.torch import compiling
from backends.torch.compiling import FixedSizes, compile_blocks, compile_mode, eagerly, made_ready
from backends.torch.denoiser import SamplingDenoiser
from backends.torch.network import UNetBlock
from backends.torch.step import batch_loss
from backends.torch.telemetry import measured
from edm2_core.errors import InputError

# which the compiler looks at of a block's input, and hides unless warnings are errors
quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_the_layout_of_weights_changes_no_step_and_no_state() -> None:
    last = make_network()
    last.to(memory_format=torch.channels_last)
    first, other = train(make_network()), train(last)
    assert distance(first, other) < 1e-3
    learner = train(last, steps=0)
    learner.load_state(other.state())
    weight = learner.weights["unet.enc.8x8_block0.conv_res0.weight"]
    moment = learner.optimizer.state[weight]["exp_avg"]
    assert moment.stride() == weight.stride() != weight.contiguous().stride()


def test_recomputed_activations_give_the_same_gradients_from_less_memory() -> None:
    """Memory by the number of elements that autograd keeps."""
    gradients, kept = [], []
    for recomputes in (False, True):
        network, count = make_network(dropout=0.1).train(), [0]
        network.unet.recomputes = recomputes

        def pack(x: Tensor, count: list[int] = count) -> Tensor:
            count[0] += x.numel()
            return x

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = batch_loss(network, make_batch()).sum()
        loss.backward()
        gradients.append([p.grad for p in network.parameters()])
        kept.append(count[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < kept[0] / 2


def test_a_batch_is_padded_to_a_size_seen_before() -> None:
    network, seen = SamplingDenoiser(make_network()), []

    def answer(*inputs: Tensor | None) -> Tensor:
        seen.append(len(inputs[0]))
        return network.denoised(*inputs)

    fixed = SamplingDenoiser(network.network, FixedSizes(answer))
    for size in (12, 7, 6, 12):
        x, labels = make_batch(size).images, make_batch(size).labels
        torch.testing.assert_close(fixed(x, 0.7, labels), network(x, 0.7, labels))
    assert seen == [12, 12, 6, 12]  # 6 is half: a size of its own


def test_compilation_is_for_gpus_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    monkeypatch.setattr(compiling, "has_cpp", lambda: False)
    assert [compile_mode("auto", device) for device in (CPU, CUDA)] == [None, "default"]
    assert compile_mode("off", CUDA) is None
    assert compile_mode("max", CUDA) == "max-autotune-no-cudagraphs"
    assert compile_mode("blocks", CUDA) == "default"
    for asked in ("max", "blocks"):
        with pytest.raises(InputError, match=rf"--compile {asked} needs a C\+\+ compiler, got none: install it"):
            compile_mode(asked, CPU)
    monkeypatch.setattr(compiling, "has_triton", lambda: False)
    assert compile_mode("auto", CUDA) is None


def test_steps_at_any_noise_and_time_share_one_graph() -> None:
    """Counted by a backend of torch.compile that runs what it is given."""
    graphs = CompileCounter()
    network = make_network(dropout=0.1)
    network.compile(backend=graphs, fullgraph=True, dynamic=False)
    train(network, steps=3)
    assert graphs.frame_count == 1


@quiet
def test_equal_blocks_share_what_is_compiled_for_steps_of_all_sizes() -> None:
    """Kinds of block by what the compiler sees of them: shapes and roles."""
    graphs, network = CompileCounter(), make_network(channel_mult=(1,), num_blocks=3, dropout=0.1)
    blocks = [module for module in network.modules() if isinstance(module, UNetBlock)]
    kinds = {(b.block.role, b.block.resample, b.block.heads, b.conv_res0.weight.shape, b.conv_skip is None)
             for b in blocks}  # fmt: skip
    compile_blocks(network, backend=graphs)
    learner = train(network, steps=3, microbatch=5)  # of 12: parts of 5, 5 and 2
    for size in (9, 7):
        learner.step(make_batch(size), lr=0.01)
    assert graphs.frame_count == len(kinds) < len(blocks) - 3
    with eagerly():
        network(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 1, 1), None)
    assert graphs.frame_count == len(kinds)


@quiet
def test_blocks_that_are_compiled_change_no_step() -> None:
    plain, compiled = make_network(), make_network()
    compile_blocks(compiled, backend="aot_eager")
    assert distance(train(plain, 2, microbatch=7), train(compiled, 2, microbatch=7)) < 1e-3


@quiet
def test_telemetry_sees_the_layers_of_compiled_blocks() -> None:
    graphs, compiled = CompileCounter(), make_network()
    compile_blocks(compiled, backend=graphs)
    plain, seen = (measured(train(net, steps=0), make_batch(), lr=0.01)[1] for net in (make_network(), compiled))
    for name, magnitudes in plain.activations.items():
        assert seen.activations[name] == pytest.approx(magnitudes, rel=1e-5)


@pytest.mark.skipif(not compiling.has_cpp(), reason="torch.compile writes C++")
def test_what_a_learner_compiles_beside_the_network_changes_no_step() -> None:
    assert distance(train(make_network()), train(make_network(), compiles=True)) < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graphs_give_what_the_network_gives() -> None:
    network = make_network().to("cuda")
    made_ready(network, CUDA, None)
    plain = SamplingDenoiser(network)
    graphs = SamplingDenoiser(network, compiling.Graphs(plain.denoised))
    for seed in range(3):
        batch = make_batch(seed=seed)
        x, labels = batch.images.cuda(), batch.labels.cuda()
        torch.testing.assert_close(graphs(x, 0.5 + seed, labels), plain(x, 0.5 + seed, labels))


def test_the_benchmark_of_a_gpu_runs_here(tmp_path: Path) -> None:
    words = (
        "--device",
        "cpu",
        "--tiny",
        "--rounds",
        "1",
        "--seconds",
        "50",
        "--cases",
        "torch:xs",
        "--out",
        tmp_path / "figures",
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, words)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "figures.md").read_text()
    for case in ("step, batch 4", "two averages", "forward", "7 evaluations", "guided by itself"):
        assert case in text
