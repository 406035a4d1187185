"""The network that the ports are timed with, beside those of the presets."""

from edm2_core.network import NetworkConfig

BENCH_32 = NetworkConfig(
    img_resolution=32,
    img_channels=3,
    model_channels=64,
    channel_mult=(1, 2, 3),
    num_blocks=2,
    attn_resolutions=(16, 8),
    channels_per_head=64,
)
"""32x32x3, 64 channels x1,2,3, two blocks, attention at 16 and 8."""
