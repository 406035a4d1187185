"""``Network.from_pretrained``, ``save_pretrained`` and ``push_to_hub``, as networks on the Hugging Face hub have them.

All that they need is imported when they are called: a network alone needs PyTorch, and a folder no package of the hub.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from edm2_core.codec import DataFormat
from edm2_core.network import NetworkConfig

if TYPE_CHECKING:
    from backends.pipeline.checkpoints.snapshots import Snapshot

    from .network import Network


class Pretrained:
    """A network that is stored in a folder or on the hub. ``format``: what its data are, as far as it is known."""

    config: NetworkConfig
    format: DataFormat | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        sigma_rel: float | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> "Network":
        """The network at ``name``, in evaluation mode: of :meth:`save_pretrained`, of ``edm2 publish``, or a run.

        Args:
            name: a folder or a snapshot, or else a repository of the hub, user/name.
            revision: branch, tag or commit of the repository; None: the last one.
            sigma_rel, device, dtype: as :func:`backends.torch.api.load`.

        Raises:
            InputError: as :func:`backends.torch.api.load`, or the hub does not have it.
        """
        from backends.pipeline.checkpoints.hub import SCHEME
        from backends.pipeline.checkpoints.remote import is_url

        from .api import load

        place = str(name)
        if not is_url(place) and not Path(place).exists():
            place = f"{SCHEME}{place}{f'@{revision}' if revision else ''}"
        return load(place, sigma_rel=sigma_rel, device=device, dtype=dtype)

    def save_pretrained(self, folder: str | Path, /) -> None:
        """Write the weights, in float32, and config.json, which describes the network."""
        from backends.pipeline.checkpoints.atomic import write_bytes
        from backends.pipeline.checkpoints.snapshots import description, save_snapshot
        from backends.pipeline.runs.networks import WEIGHTS

        snapshot = self._snapshot()
        save_snapshot(Path(folder) / WEIGHTS, snapshot, dtype="float32")
        described = json.dumps(description(snapshot), indent=1).encode() + b"\n"
        write_bytes(Path(folder) / "config.json", described)

    def push_to_hub(
        self,
        repo: str,
        /,
        *,
        license: str | None = None,
        private: bool = False,
        force: bool = False,
        message: str = "Upload a network of edm2",
        token: str | None = None,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes, and a model card, in one commit. Returns the repository's page.

        Args:
            repo: user/name; created if it is new.
            license: by the hub's name, such as cc-by-4.0; None: none is named.
            private, force, token: as :func:`backends.pipeline.checkpoints.hub.publish`.

        Raises:
            InputError: as :func:`backends.pipeline.checkpoints.hub.publish`.
        """
        from backends.pipeline.checkpoints.hub import SCHEME, named, publish
        from backends.pipeline.runs.model_card import Card, card_text, check_licence

        address = SCHEME + named(repo)
        card = Card(address, license and check_licence(license), [self._snapshot()])
        with TemporaryDirectory(prefix="edm2-push-") as folder:
            self.save_pretrained(folder)
            saved = {path.name: path for path in Path(folder).iterdir()}
            files: dict[str, Path | bytes] = {"README.md": card_text(card).encode(), **saved}
            return publish(address, files, message=message, private=private, force=force, token=token)

    def _snapshot(self) -> "Snapshot":
        from backends.pipeline.checkpoints.snapshots import Snapshot

        from .weights import dump, tensors

        module: Any = self
        params = dump(tensors(module))
        return Snapshot(params=params, config=self.config, nimg=0, length=None, data=self.format)
