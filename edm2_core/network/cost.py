"""Counts of parameters and multiply-adds, from the plan of a network. Source: arXiv 2312.02696 Tables 1 and 6."""

from math import prod

from .config import NetworkConfig
from .unet import plan


def parameter_count(config: NetworkConfig, /) -> int:
    """How many trained scalars the denoiser has, as Tables 1 and 6 count them: without the uncertainty u(sigma), which
    is dropped after training, and without Fourier constants."""
    table = plan(config).parameters
    return sum(prod(p.shape) for name, p in table.items() if p.trained and not name.startswith("logvar"))


def multiply_adds(config: NetworkConfig, /) -> int:
    """Multiply-adds of one evaluation of one image; twice this number is the usual FLOP count.

    Counted are convolutions, linear layers and attention products, and three operations for each weight that is
    normalized in its layer. Departs from the paper, whose Gflops also count elementwise work on activations and are up
    to 1.5 % larger.
    """
    walk = plan(config)
    blocks = (*walk.encoder, *walk.decoder)
    pixels = {f"{block.name}.{part}": prod(block.size) for block in blocks for part in _CONVOLUTIONS}
    pixels["unet.out_conv.weight"] = prod(config.level_sizes[0])
    weights = {name: prod(p.shape) for name, p in walk.parameters.items() if p.kind == "weight"}
    products = sum(size * pixels.get(name, 1) for name, size in weights.items())
    attention = sum(2 * prod(block.size) ** 2 * block.out_channels for block in blocks if block.heads)
    return products + attention + (3 * sum(weights.values()) if walk.switches.weight_norm else 0)


def activation_count(config: NetworkConfig, /) -> int:
    """Scalars in the outputs of all blocks, for one image: what the memory of a training step grows with. Source: the
    plan; how many tensors of this size a port keeps for the backward pass is the port's."""
    walk = plan(config)
    return sum(prod(block.size) * block.out_channels for block in (*walk.encoder, *walk.decoder))


_CONVOLUTIONS = (
    "weight",  # of a block that is one convolution
    *(f"{part}.weight" for part in ("conv_res0", "conv_res1", "conv_skip", "attn_qkv", "attn_proj")),
)
