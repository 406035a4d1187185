"""Ports of the EDM2 specification, and the pipeline around them.

With this file, ``import torch`` finds PyTorch and not the folder ``torch`` here, wherever this package is on the path.
Only in a Python that is started inside this very folder, ``import torch`` is ours. If your project has a package called
``backends`` too, Python finds yours first: ``python -P -m backends.torch.train`` looks only at what is installed.
"""
