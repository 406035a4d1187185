"""Any network as a denoiser: preconditioning around a backbone, and the form in which the sampler calls it.

D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)                                                        (Eq. 4)
"""

from collections.abc import Callable

import mlx.core as mx
from mlx import nn

from edm2_core.precond import join_condition, precondition

from .device import compiled


class Denoiser(nn.Module):
    """The denoiser D of any network F: ``D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)``. Source: Eq. 4.

    Args:
        backbone: F, called as ``backbone(x, c_noise, labels)`` with x [N, ...] in ``dtype`` and c_noise [N] float32;
            ``labels`` are passed on as they come; a condition is joined to x, on the last axis. Returns the shape of x
            without the condition. A call with dropout keys passes them on as
            ``dropout=keys``.
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
        backbone: Callable[..., mx.array],
        *,
        sigma_data: float = 0.5,
        uncertainty: Callable[[mx.array], mx.array] | None = None,
        label_dim: int = 0,
        cond_channels: int = 0,
        label_dropout: float = 0.0,
        dtype: mx.Dtype = mx.float32,
    ):
        super().__init__()
        self.backbone, self.uncertainty = backbone, uncertainty
        self.sigma_data, self.dtype = sigma_data, dtype
        self.label_dim, self.label_dropout, self.cond_channels = label_dim, label_dropout, cond_channels

    def __call__(
        self,
        x: mx.array,
        sigma: mx.array,
        labels: mx.array | None = None,
        condition: mx.array | None = None,
        *,
        dropout: mx.array | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Denoised x, and the uncertainty u(sigma). Source: Eqs. 4-8, 21.

        Shapes: x [N, ..., C]; sigma [N, 1, ...], with as many axes as x; labels [N, label_dim], one-hot, or None;
        condition [N, ..., cond_channels] in the units of x, or None. Returns: denoised, like x; logvar, like sigma.
        Dtype: float32. ``dropout``: keys [N, 2], one an image, in training; None disables it.
        """
        c = precondition(sigma, sigma_data=self.sigma_data)
        c_noise = c.c_noise.reshape(-1)  # (N,)
        options = {} if dropout is None else {"dropout": dropout}
        scaled = x * c.c_in
        if condition is not None:
            scaled = join_condition(scaled, condition, sigma_data=self.sigma_data, axis=-1)
        output = self.raw(scaled.astype(self.dtype), c_noise, labels, **options).astype(x.dtype)
        return c.c_skip * x + c.c_out * output, self.logvar(c_noise).reshape(sigma.shape)

    def raw(self, x: mx.array, c_noise: mx.array, labels: mx.array | None, **dropout: mx.array) -> mx.array:
        """F: x [N, ...] already scaled by c_in, c_noise [N] to [N, ...]."""
        return self.backbone(x, c_noise, labels, **dropout)

    def logvar(self, c_noise: mx.array) -> mx.array:
        """u(sigma) from c_noise [N]; 0 where none is learned. Source: Eq. 21."""
        return mx.zeros_like(c_noise) if self.uncertainty is None else self.uncertainty(c_noise)


class SamplingDenoiser:
    """``network`` as :class:`backends.ports.LabelledDenoiser`: sigma is a float, and logvar is dropped.

    Compiled on a GPU. Each answer is evaluated, so that no graph over many sampling steps grows.
    """

    def __init__(self, network: Denoiser):
        self.label_dim, self.cond_channels = network.label_dim, network.cond_channels
        self._network = compiled(network, inputs=[network])

    def __call__(
        self, x: mx.array, sigma: float, labels: mx.array | None, condition: mx.array | None = None, /
    ) -> mx.array:
        denoised: mx.array = self._network(x, mx.full((len(x), *[1] * (x.ndim - 1)), sigma), labels, condition)[0]
        mx.eval(denoised)
        return denoised
