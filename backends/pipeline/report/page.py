"""The HTML of the report: sections with charts, tables and images on one page without external resources."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template

from edm2_core.ema import Length

from .strips import Strip, is_pixelated, picture_url


@dataclass(frozen=True, kw_only=True)
class Chart:
    """``svg`` is an element; ``description`` says what it shows, for screen readers."""

    title: str
    svg: str
    description: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """``text`` is plain text, ``body`` HTML."""

    title: str
    text: str = ""
    body: str = ""


def page(*, title: str, summary: str, sections: Sequence[Section]) -> str:
    """The HTML of the page. ``summary`` is HTML."""
    links = "".join(f'<a href="#{_anchor(s.title)}">{escape(s.title)}</a>' for s in sections)
    return Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title), summary=summary, links=links, sections="\n".join(map(_section, sections))
    )


def _section(section: Section) -> str:
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    anchor = _anchor(section.title)
    heading = f'<h2 id="{anchor}">{escape(section.title)}</h2>'
    return f'<section aria-labelledby="{anchor}">{heading}{text}{section.body}</section>'


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def note(text: str) -> str:
    """A paragraph that says why something is missing."""
    return f'<p class="note">{escape(text)}</p>'


def cards(facts: Mapping[str, Iterable[str]]) -> str:
    """A card of a few lines for each name."""
    items = (
        f"<li><b>{escape(name)}</b>{''.join(f'<span>{escape(line)}</span>' for line in lines)}</li>"
        for name, lines in facts.items()
    )
    return f'<ul class="cards">{"".join(items)}</ul>'


def charts(drawn: Iterable[Chart], *, columns: int = 0) -> str:
    """Charts in ``columns`` on a wide page, fewer on a narrow one; 0: as many as fit."""
    figures = (
        f"<figure><figcaption>{escape(chart.title)}</figcaption>"
        f'<div role="img" aria-label="{escape(chart.description)}">{chart.svg}</div></figure>'
        for chart in drawn
    )
    wide = f' style="--columns: {columns}"' if columns else ""
    return f'<div class="charts"{wide}>{"".join(figures)}</div>'


def table(names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table of options: a row for each, a column for each of ``names``."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(
        f'<tr><th scope="row">{escape(option)}</th>{"".join(f"<td>{escape(value)}</td>" for value in values)}</tr>'
        for option, values in rows.items()
    )
    return (
        f'<div class="table" tabindex="0"><table><thead><tr><th scope="col">option</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def folded(title: str, body: str) -> str:
    """``body`` in an element that opens when ``title`` is clicked."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def slider(strips: Mapping[str, Sequence[Strip]], seeds: Sequence[int]) -> str:
    """One slider that chooses the length of the strips shown, for all runs side by side.

    Strips of traditional averages are always shown; without JavaScript all strips are.
    """
    lengths = sorted({strip.length for own in strips.values() for strip in own if strip.length.relative})
    runs = "".join(_strips(name, own, lengths, seeds) for name, own in strips.items())
    return f'{_range(lengths) if lengths else ""}<div class="runs">{runs}</div>'


def _range(lengths: Sequence[Length]) -> str:
    first = min(range(len(lengths)), key=lambda i: abs(lengths[i].value - 0.1))
    ticks = "".join(f"<span>{length}</span>" for length in lengths)
    return (
        '<div class="slider"><label for="length">Length of the average, sigma_rel: '
        '<output for="length"></output></label><input type="range" id="length" '
        f'min="0" max="{len(lengths) - 1}" step="1" value="{first}" autocomplete="off">'
        f'<div class="ticks" aria-hidden="true">{ticks}</div></div>'
    )


def _strips(name: str, own: Sequence[Strip], lengths: Sequence[Length], seeds: Sequence[int]) -> str:
    by_length = {strip.length: _pictures(strip, seeds) for strip in own}
    parts = [pictures for length, pictures in by_length.items() if not length.relative]
    for length in lengths:
        shown = by_length.get(length) or note(f"{length} cannot be made of what is stored")
        parts.append(f'<div data-length="{length}">{shown}</div>')
    return f"<article><h3>{escape(name)}</h3>{''.join(parts)}</article>"


def _pictures(strip: Strip, seeds: Sequence[int]) -> str:
    kind = ' class="pixelated"' if is_pixelated(strip.images[0]) else ""
    pictures = "".join(
        f'<img{kind} src="{picture_url(image)}" alt="seed {seed}{"" if label < 0 else f", class {label}"}, '
        f'length {strip.length}" width="{image.shape[2]}" height="{image.shape[1]}">'
        for seed, label, image in zip(seeds, strip.labels.tolist(), strip.images, strict=True)
    )
    return f'<p>{escape(strip.caption)}</p><div class="pictures">{pictures}</div>'
