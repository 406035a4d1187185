"""EDM2 in diffusers: a model and a pipeline, loaded from the folder that ``edm2 export --to diffusers`` writes.

    pipeline = EDM2Pipeline.from_pretrained("exported")
    images = pipeline([3, 7], generator=torch.Generator().manual_seed(0)).images

The network is made for EDM's sampler, :func:`edm2_core.sampler.sample`, whose settings are those of an
:class:`~.diffusers_scheduler.EDM2Scheduler`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers import SchedulerMixin as SchedulerMixin  # diffusers looks here for the bases of components
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from backends.pipeline.data.batches import label_rows
from backends.pipeline.data.labels import check_labels
from backends.pipeline.runs.pictures import visible
from backends.ports import sample
from edm2_core.codec import DataFormat
from edm2_core.errors import InputError
from edm2_core.network import NetworkConfig

from .denoiser import SamplingDenoiser
from .device import full_precision
from .diffusers_scheduler import EDM2Scheduler as EDM2Scheduler  # found here by the folders that are exported
from .network import Network

OUTPUTS = ("pil", "np", "pt", "latent")


class EDM2Model(ModelMixin, ConfigMixin):
    """An EDM2 network as a model of diffusers; activations are computed in the dtype of its weights.

    Args:
        network: the fields of :class:`~edm2_core.network.NetworkConfig`.
        data: what its data are, as :meth:`edm2_core.codec.DataFormat.to_json` gives it; None: 8-bit images.
    """

    @register_to_config
    def __init__(self, network: Mapping[str, Any], data: Mapping[str, Any] | None = None):
        super().__init__()
        self.net = Network(NetworkConfig(**network))
        self.format = DataFormat() if data is None else DataFormat.from_json(data)

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`.denoiser.Denoiser.forward`."""
        self.net.dtype = self.dtype
        answer: tuple[Tensor, Tensor] = self.net(x, sigma, labels, condition)
        return answer

    def denoiser(self) -> SamplingDenoiser:
        """The network as the sampler calls it."""
        self.net.dtype = self.dtype
        return SamplingDenoiser(self.net)


class EDM2Pipeline(DiffusionPipeline):
    """Samples of an EDM2 network.

    Args:
        model: the network.
        vae: diffusers' autoencoder, for a network of latents.
        guide: the network that guides; None: ``model`` itself without its label.
        scheduler: noise levels and method; None: the paper's.
    """

    model_cpu_offload_seq = "guide->model->vae"
    _optional_components = ["vae", "guide", "scheduler"]  # noqa: RUF012 (diffusers needs a list)

    def __init__(
        self,
        model: EDM2Model,
        vae: Any = None,
        guide: EDM2Model | None = None,
        scheduler: EDM2Scheduler | None = None,
    ):
        super().__init__()
        self.register_modules(model=model, vae=vae, guide=guide, scheduler=scheduler or EDM2Scheduler())

    @torch.inference_mode()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor | None = None,
        *,
        batch_size: int | None = None,
        num_inference_steps: int = 32,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        condition: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], dict[str, Any]] | None = None,
        **solver: Any,
    ) -> Any:
        """Sample images.

        Args:
            class_labels: class ids [N], or label vectors [N, label_dim]; None: random classes, where there are any.
            batch_size: number of images, where neither labels nor latents say it; 1 by default.
            num_inference_steps: noise levels; the network is evaluated twice at each but the last.
            guidance_scale: 1 is without guidance.
            generator: of noise and of random classes; a list has one for each image.
            latents: the noise itself, standard normal, [N, C, H, W].
            condition: [N, cond_channels, H, W], for a network that takes one.
            output_type: "pil"; "np" [N, H, W, C] or "pt" [N, C, H, W], pictures from 0 to 1; or "latent", as the
                network gives them, [N, C, H, W].
            callback_on_step_end: as in diffusers: ``(pipeline, step, sigma, {"latents": x})`` to a dict, whose
                ``"latents"`` take the place of x.
            solver: ``guide_interval`` of :func:`backends.ports.sample`, and options of
                :func:`edm2_core.sampler.sample`, which come before those of the scheduler.

        Raises:
            InputError: an output type that is not one of these, a ``batch_size`` that contradicts the inputs, latents
                to decode without a ``vae``, labels that do not fit, or as :func:`backends.ports.sample`.
        """
        config, place = self.model.net.config, self._execution_device
        self._check(output_type)
        generators = generator if isinstance(generator, list) else [generator]
        given = next((len(x) for x in (class_labels, latents, condition) if x is not None), batch_size or 1)
        if batch_size not in (None, given):
            raise InputError(
                f"batch_size must be that of the labels or latents, {given}, got {batch_size}: leave it out"
            )
        labels = self._labels(class_labels, given, generators[0])
        shape = (given, config.img_channels, *config.image_size)
        noise = randn_tensor(shape, generator=generator, device=place) if latents is None else latents.to(place)
        guide = None if self.guide is None else self.guide.denoiser()
        check_labels(self.model.denoiser(), guide, labels, guidance_scale)

        with full_precision(), self.progress_bar(total=num_inference_steps) as bar:

            def after(step: Any) -> Any:
                bar.update()
                if callback_on_step_end is None:
                    return None
                return callback_on_step_end(self, step.index, step.sigma, {"latents": step.x}).get("latents")

            samples = sample(
                self.model.denoiser(),
                noise.float(),
                labels,
                condition=None if condition is None else condition.to(place),
                guide=guide,
                guidance=guidance_scale,
                num_steps=num_inference_steps,
                callback=after,
                **self.scheduler.settings() | solver,
            )
        images = self._output(samples, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(self, output_type: str) -> None:
        if output_type not in OUTPUTS:
            raise InputError(f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r}")
        codec = self.model.format.codec
        if output_type != "latent" and codec.vae is not None and self.vae is None:
            raise InputError(
                f"latents must be decoded by an autoencoder, got none: give from_pretrained vae={codec.vae}, opened by "
                "diffusers, or ask for output_type='latent'"
            )

    def _labels(self, given: Any, count: int, generator: torch.Generator | None) -> Tensor | None:
        """Rows of labels [N, label_dim], on the device."""
        label_dim, place = self.model.net.label_dim, self._execution_device
        if given is None and not label_dim:
            return None
        if given is None:
            at = "cpu" if generator is None else generator.device
            given = torch.randint(label_dim, (count,), generator=generator, device=at)
        labels = torch.as_tensor(given, device=place)
        if labels.ndim == 1 and not bool(((labels >= 0) & (labels < label_dim)).all()):
            raise InputError(f"class_labels must be from 0 to {label_dim - 1}, got {labels.tolist()}")
        return label_rows(labels, label_dim) if labels.ndim == 1 else labels.float()

    def _output(self, samples: Tensor, output_type: str) -> Any:
        """Samples as the caller asked for them."""
        if output_type == "latent":
            return samples
        format = self.model.format
        if format.codec.vae is not None:
            latents = format.codec.decode(samples).to(self.vae.dtype)
            pictures = ((self.vae.decode(latents).sample.float() + 1) / 2).clamp(0, 1)
        else:
            pictures = torch.from_numpy(visible(samples.cpu().numpy(), format)).float() / 255
        if output_type == "pt":
            return pictures
        array = np.asarray(pictures.permute(0, 2, 3, 1).cpu().numpy())
        return array if output_type == "np" else self.numpy_to_pil(array)
