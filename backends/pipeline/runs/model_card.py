"""The model card of a published network: README.md of its repository, in the hub's format."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.pipeline.checkpoints.hub import LIBRARY, SCHEME, Address
from backends.pipeline.checkpoints.snapshots import Metadata
from edm2_core.codec import DataFormat
from edm2_core.errors import InputError
from edm2_core.network import parameter_count

from .config import TrainConfig
from .messages import ladder_text

_RECIPE = "the EDM2 recipe ([arXiv 2312.02696](https://arxiv.org/abs/2312.02696))"
_ALT = {"lengths": "The same seeds, from averages of several lengths"}


@dataclass(frozen=True)
class Card:
    """What a card tells: of the address, hf://user/name or a folder; the licence, perhaps None; the averages there; the
    config of their run, if it is known; figures as in figures.jsonl; and names of pictures there."""

    address: str
    licence: str | None
    averages: Sequence[Metadata]
    config: TrainConfig | None = None
    figures: Sequence[Mapping[str, Any]] = ()
    pictures: Sequence[str] = field(default=())


def card_text(card: Card, /) -> str:
    """The text of README.md."""
    parts = [
        _head(card),
        f"# {card.address.removeprefix(SCHEME)}",
        f"A diffusion network by {_RECIPE}, made with {LIBRARY}.",
        *(f"![{_ALT.get(Path(name).stem, 'Samples')}]({name})" for name in card.pictures),
        _table(("", ""), [(what, text) for what, text in _facts(card) if text]),
        *_figures(card),
        _use(card),
    ]
    return "\n\n".join(parts) + "\n"


def _head(card: Card) -> str:
    """The metadata, in YAML, of which JSON's texts are a part."""
    lines = [f"license: {card.licence}"] if card.licence else []
    lines += [f"library_name: {LIBRARY}", f"pipeline_tag: {_task(card)}", "tags:", f"- {LIBRARY}", "- diffusion"]
    data = None if card.config is None else card.config.data
    if data is not None and data.startswith(SCHEME):
        lines += ["datasets:", f"- {json.dumps(Address.of(data).repo)}"]
    return "\n".join(["---", *lines, "---"])


def _task(card: Card) -> str:
    """The hub's name of what it does."""
    config = card.averages[0].required_config()
    return "image-to-image" if config.cond_channels else "unconditional-image-generation"


def _facts(card: Card) -> list[tuple[str, str]]:
    network, config = card.averages[0].required_config(), card.config
    format = card.averages[0].data or DataFormat()
    height, width = network.image_size
    count = parameter_count(network)
    size = f"{count / 1e6:.2f} M" if count >= 1e6 else str(count)
    what = "latents" if format.codec.vae else "images"
    facts = [
        ("network", f"{ladder_text(network)}: {size} parameters, {network.model_channels} channels"),
        ("output", f"{what} of {width}x{height}, {_number(network.img_channels, 'channel')}{_of_vae(format)}"),
        ("classes", _classes(network.label_dim, format)),
        ("averages", _averages(card.averages)),
    ]
    if config is None:
        return facts
    summary, hyper = config.data_summary, config.hyper
    samples = "" if summary is None else f", {summary.count} samples"
    return [
        ("data", f"{config.data}{samples}"),
        ("condition", config.condition or ""),
        ("began with", config.init or ""),
        *facts,
        (
            "training",
            f"preset {config.preset}: batches of {hyper.batch}, learning rate {hyper.lr:g}, {config.precision}",
        ),
    ]


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _of_vae(format: DataFormat) -> str:
    return f", of the autoencoder {format.codec.vae}" if format.codec.vae else ""


def _classes(label_dim: int, format: DataFormat) -> str:
    if not label_dim:
        return ""
    shown = ", ".join(format.classes[:10]) + (", ..." if len(format.classes) > 10 else "")
    return f"{label_dim}{f': {shown}' if shown else ''}"


def _averages(averages: Sequence[Metadata]) -> str:
    by_time: dict[int, list[str]] = {}
    for one in averages:
        by_time.setdefault(one.nimg, []).append(_length(one))
    texts = [f"{', '.join(lengths)}, after {nimg} images" for nimg, lengths in sorted(by_time.items())]
    return texts[0] if len(texts) == 1 else f"{len(averages)} of {len(texts)} times; the last: {texts[-1]}"


def _length(one: Metadata) -> str:
    if one.length is None:
        return "raw weights"
    return f"sigma_rel {one.length}" if one.length.relative else str(one.length)


def _figures(card: Card) -> list[str]:
    """The last figure of each metric, average and setting that is published."""
    published = {(one.nimg, one.length and one.length.value) for one in card.averages}
    kept: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for line in card.figures:
        if (line.get("nimg"), line.get("length")) in published:
            settings = tuple(str(line.get(name)) for name in ("guidance", "steps", "seeds"))
            kept[line["metric"], line["extractor"], line["length"], *settings] = line
    rows = [_row(name, value, line) for line in kept.values() for name, value in line["figures"].items()]
    if not rows:
        return []
    return ["## Figures", _table(("metric", "figure", "images", "extractor", "average", "steps", "guidance"), rows)]


def _row(name: str, value: float, line: Mapping[str, Any]) -> tuple[str, ...]:
    weights = str(line.get("weights") or "")[:8]
    extractor = f"{line['extractor']}{f' ({weights})' if weights else ''}"
    given = (str(line.get(key, "")) for key in ("length", "steps", "guidance"))
    return (name, f"{value:.6g}", str(line["count"]), extractor, *given)


def _use(card: Card) -> str:
    classes = " --class 0" if card.averages[0].required_config().label_dim else ""
    place = card.address
    several = len(card.averages) > 1
    other = f"\n    python -m backends.torch.sample --net {place} --sigma-rel 0.12     # an average of another length"
    return f"""## Use

    pip install 'edm2[torch,hub]'                # or jax, mlx
    python -m backends.torch.sample --net {place}{classes}{other if several else ""}

From Python, in PyTorch (`backends.jax.api` and `backends.mlx.api` are alike):

    from backends.torch import api
    network = api.load("{place}")     # an nn.Module; api.sample draws images"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(text) for text in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def check_licence(licence: str | None, /) -> str:
    """``licence``, if it can be one of the hub's names. Raises InputError."""
    known = (
        "apache-2.0, mit, cc-by-4.0, cc-by-nc-4.0, openrail, other; all: https://hf.co/docs/hub/repositories-licenses"
    )
    if licence is None:
        raise InputError(f"--license must be given to publish, got none: choose the network's, such as {known}")
    if not licence or not all(c.isascii() and (c.isalnum() or c in ".+-") for c in licence):
        raise InputError(f"--license must be a name that the hub knows, got {licence!r}: choose of {known}")
    return licence
