"""edm2 dataset decode: latents as images."""

from backends.pipeline.data.datasets import open_dataset
from backends.pipeline.data.encode import decode
from backends.pipeline.runs.progress import Progress
from edm2_core.errors import InputError

from .dataset_encode import Options as Options
from .dataset_encode import autoencoders


def run(options: Options) -> None:
    """Write the images.

    Raises:
        InputError: no autoencoder, PyTorch or diffusers; data that are no latents; or an output that exists.
    """
    dataset = open_dataset(options.source)
    name = options.vae or dataset.format.codec.vae
    if name is None:
        raise InputError(f"data to decode must be latents, got others in {options.source}: they need no decoding")
    decoder = autoencoders().open_decoder(name, options.device)
    with Progress(total=len(dataset)) as progress:
        decode(dataset, options.dest, decoder, batch=options.batch, progress=progress.done)
    print(f"wrote     {options.dest}: {len(dataset)} images")
