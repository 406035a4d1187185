"""Telemetry as a run writes it, for tests of the report."""

BLOCKS = {"unet.enc.8x8_block0": ("enc", 8), "unet.enc.4x4_block0": ("enc", 4), "unet.dec.8x8_block0": ("dec", 8)}
COLUMNS = [f"{kind}_{part}" for kind in ("activation", "weight", "gradient") for part in ("max", "mean")] + ["update"]


def measurement(nimg, *, value=1.0, u=0.5, blocks=BLOCKS):
    return {
        "nimg": nimg,
        "blocks": {
            name: {"role": role, "size": [resolution, resolution], **dict.fromkeys(COLUMNS, value)}
            for name, (role, resolution) in blocks.items()
        },
        "noise": {"sigma": [0.1, 1.0, 10.0], "loss": [value, 0.5, None], "u": [u, u, None], "count": [3, 4, 0]},
    }
