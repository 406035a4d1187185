"""Any network as a denoiser: preconditioning around a backbone, and the form in which the sampler calls it.

D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)                                                        (Eq. 4)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edm2_core.precond import Preconditioning


def precondition(sigma: Tensor, *, sigma_data: float) -> Preconditioning:
    """:func:`edm2_core.precond.precondition` in PyTorch calls alone, which torch.compile traces without a warning."""
    variance = sigma.square() + sigma_data**2
    root = variance.sqrt()
    return Preconditioning(sigma_data**2 / variance, sigma * sigma_data / root, 1 / root, sigma.log() / 4)


class Denoiser(nn.Module):
    """The denoiser D of any network F, and its uncertainty u. Source: Eqs. 4-8, 21.

    Args:
        backbone: F, called as ``backbone(x, c_noise, labels)`` with x [N, ...] in ``dtype`` and c_noise [N] float32;
            ``labels`` are passed on as they come; a condition is joined to x, on axis 1. Returns the shape of x
            without the condition.
        sigma_data: standard deviation of the data.
        uncertainty: u, called as ``uncertainty(c_noise)``, [N] to [N] or [N, 1]; None: u is 0.
        label_dim: number of classes or length of label vectors, 0 for a network without labels.
        cond_channels: channels of the condition that the backbone takes, 0 for none.
        label_dropout: share of training images whose label is dropped (:func:`edm2_core.loss.drop_labels`); above 0,
            the network may be sampled without labels and guide itself.
        dtype: of the backbone's input, and so of its activations.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        sigma_data: float = 0.5,
        uncertainty: nn.Module | None = None,
        label_dim: int = 0,
        cond_channels: int = 0,
        label_dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.backbone, self.uncertainty = backbone, uncertainty
        self.sigma_data, self.dtype = sigma_data, dtype
        self.label_dim, self.label_dropout, self.cond_channels = label_dim, label_dropout, cond_channels

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, condition: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Denoise ``x`` at noise level ``sigma``; also the uncertainty, named logvar.

        Shapes: x [N, C, ...]; sigma [N, 1, ...], with as many axes as x; labels one-hot [N, label_dim], or None for the
        unconditional answer; condition [N, cond_channels, ...] in the units of x, or None. Returns denoised like x, and
        logvar like sigma. Dtype: that of x, float32 or wider.
        """
        c = precondition(sigma, sigma_data=self.sigma_data)
        c_noise = c.c_noise.flatten()  # (N, 1, ...) to (N,)
        scaled = x * c.c_in
        if condition is not None:
            scaled = torch.cat([scaled, condition / self.sigma_data], dim=1)  # (N, C + cond_channels, ...)
        output = self.raw(scaled.to(self.dtype), c_noise, labels).to(x.dtype)
        return torch.addcmul(c.c_skip * x, c.c_out, output), self.logvar(c_noise).reshape(sigma.shape)

    def raw(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        """The network F: x [N, ...] already scaled by c_in, c_noise [N]."""
        output: Tensor = self.backbone(x, c_noise, labels)
        return output

    def logvar(self, c_noise: Tensor) -> Tensor:
        """u(sigma) from c_noise [N]; 0 where none is learned. Source: Eq. 21."""
        return torch.zeros_like(c_noise) if self.uncertainty is None else self.uncertainty(c_noise)


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Within it, ``networks`` are in evaluation mode; afterwards every module has its own mode again."""
    modes = {module: module.training for network in networks for module in network.modules()}
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class SamplingDenoiser:
    """``network`` as :class:`backends.ports.LabelledDenoiser`: sigma is a float, and logvar is dropped. ``answer`` is
    another way to call it, such as :class:`~.compiling.FixedSizes`; None: directly."""

    network: Denoiser
    answer: Callable[..., Tensor] | None = None

    @property
    def label_dim(self) -> int:
        return self.network.label_dim

    @property
    def cond_channels(self) -> int:
        return self.network.cond_channels

    @torch.inference_mode()
    def __call__(self, x: Tensor, sigma: float, labels: Tensor | None, condition: Tensor | None = None, /) -> Tensor:
        level = x.new_full((len(x), *[1] * (x.ndim - 1)), sigma)  # (N, 1, ...)
        return (self.answer or self.denoised)(x, level, labels, condition)

    def denoised(self, *inputs: Tensor | None) -> Tensor:
        denoised: Tensor = self.network(*inputs)[0]
        return denoised
