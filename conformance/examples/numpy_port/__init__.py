"""A fourth port: the reference behind a port's members. ``--port conformance.examples.numpy_port:PORT``.

It denoises and samples in float64. It has no derivatives and does not train: the report says so.
"""

from conformance.examples.numpy_port.adapter import PORT

__all__ = ["PORT"]
