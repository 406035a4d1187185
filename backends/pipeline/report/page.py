"""The HTML of the report: sections with charts, tables and images on one page without external resources."""

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from edm2_core.ema import Length

from .lines import Lines
from .strips import Strip, is_pixelated, picture_url


@dataclass(frozen=True, kw_only=True)
class Chart:
    """``lines``, or a ``picture``, a file; ``description`` says what it shows, for screen readers."""

    title: str
    description: str
    lines: Lines | None = None
    picture: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Section:
    """``text`` is plain text, ``body`` HTML."""

    title: str
    text: str = ""
    body: str = ""


def page(*, title: str, summary: str, sections: Sequence[Section], version: str | None = None) -> str:
    """The HTML of the page. ``summary`` is HTML. ``version``: of a page that is served, which looks for another."""
    links = "".join(f'<a href="#{_anchor(s.title)}">{escape(s.title)}</a>' for s in sections)
    live = "" if version is None else f'<p id="live" class="dim" data-version="{escape(version)}">live</p>'
    return Template(_web("page.html")).substitute(
        title=escape(title),
        live=live,
        summary=summary,
        links=links,
        sections="\n".join(map(_section, sections)),
        style=_web("uPlot.min.css") + _web("report.css"),
        charts=_web("uPlot.iife.min.js"),
        script=_web("report.js") + ("" if version is None else _web("live.js")),
    )


def _web(name: str) -> str:
    return files(__package__).joinpath("web", name).read_text(encoding="utf-8")


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
    wide = f' style="--columns: {columns}"' if columns else ""
    return f'<div class="charts"{wide}>{"".join(map(_figure, drawn))}</div>'


def _figure(chart: Chart) -> str:
    title, description = escape(chart.title), escape(chart.description)
    if chart.lines is None:
        assert chart.picture is not None
        data = b64encode(chart.picture.read_bytes()).decode()
        picture = f'<img class="map" src="data:image/png;base64,{data}" alt="{description}">'
        return f"<figure><figcaption>{title}</figcaption>{picture}</figure>"
    data = chart.lines.to_json().replace("<", "\\u003c")
    return (
        f'<figure class="lines"><figcaption>{title} <button type="button" class="log">log</button></figcaption>'
        f'<div class="plot" role="img" tabindex="0" aria-label="{description}"></div><div class="legend"></div>'
        f'<script type="application/json">{data}</script></figure>'
    )


def cell(text: str, kind: str = "") -> str:
    """A cell of a table; ``kind`` is a class of the style sheet."""
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


def table(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table with the columns ``head``: by the name of a row, its cells."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>' for name, cells in rows.items())
    return (
        f'<div class="table" tabindex="0"><table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def groups(tables: Mapping[str, str]) -> str:
    """Tables under a heading each, in as many columns as fit."""
    return "".join(
        ('<div class="groups">', *(f"<section><h3>{escape(t)}</h3>{b}</section>" for t, b in tables.items()), "</div>")
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
        f'<figure><img{kind} src="{picture_url(image)}" alt="seed {seed}{f", {label}" if label else ""}, '
        f'length {strip.length}" width="{image.shape[2]}" height="{image.shape[1]}">'
        f"<figcaption>{seed}{f' · {label}' if label else ''}</figcaption></figure>"
        for seed, label, image in zip(seeds, map(escape, strip.classes), strip.images, strict=True)
    )
    return f'<p>{escape(strip.caption)}</p><div class="pictures">{pictures}</div>'
