"""How are charts, tables and pictures put on one page that needs nothing else?"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template

from .strips import Strip, is_pixelated, picture_url


@dataclass(frozen=True, kw_only=True)
class Chart:
    """``svg`` is an element; ``says`` is what it shows, for who cannot see it."""

    title: str
    svg: str
    says: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """``text`` is plain, ``body`` HTML."""

    title: str
    text: str = ""
    body: str = ""


def page(*, title: str, summary: str, sections: Sequence[Section]) -> str:
    """The whole page."""
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
    """Why something is not here."""
    return f'<p class="note">{escape(text)}</p>'


def cards(facts: Mapping[str, Iterable[str]]) -> str:
    """A few facts by name, one card each."""
    made = (
        f"<li><b>{escape(name)}</b>{''.join(f'<span>{escape(line)}</span>' for line in lines)}</li>"
        for name, lines in facts.items()
    )
    return f'<ul class="cards">{"".join(made)}</ul>'


def charts(drawn: Iterable[Chart], *, columns: int = 0) -> str:
    """Side by side where there is room; ``columns`` of them on a wide page, as many as fit where it is 0."""
    made = (
        f'<figure><figcaption>{escape(chart.title)}</figcaption><div role="img" aria-label="{escape(chart.says)}">'
        f"{chart.svg}</div></figure>"
        for chart in drawn
    )
    wide = f' style="--columns: {columns}"' if columns else ""
    return f'<div class="charts"{wide}>{"".join(made)}</div>'


def table(names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A column for each of ``names``."""
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
    """``body`` behind ``title``, which opens it."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def slider(strips: Mapping[str, Sequence[Strip]], seeds: Sequence[int]) -> str:
    """The strips of each run, side by side, all of the length that one slider is at; those without a length stay.
    Without scripts all are shown."""
    lengths = sorted({strip.sigma_rel for own in strips.values() for strip in own if strip.sigma_rel is not None})
    runs = "".join(_strips(name, own, lengths, seeds) for name, own in strips.items())
    return f'{_range(lengths) if lengths else ""}<div class="runs">{runs}</div>'


def _range(lengths: Sequence[float]) -> str:
    first = min(range(len(lengths)), key=lambda i: abs(lengths[i] - 0.1))
    ticks = "".join(f"<span>{length:g}</span>" for length in lengths)
    return (
        '<div class="slider"><label for="length">Length of the average, sigma_rel: '
        '<output for="length"></output></label><input type="range" id="length" '
        f'min="0" max="{len(lengths) - 1}" step="1" value="{first}" autocomplete="off">'
        f'<div class="ticks" aria-hidden="true">{ticks}</div></div>'
    )


def _strips(name: str, own: Sequence[Strip], lengths: Sequence[float], seeds: Sequence[int]) -> str:
    found = {strip.sigma_rel: strip for strip in own}
    parts = [_pictures(strip, seeds) for strip in own if strip.sigma_rel is None]
    for length in lengths:
        missing = note(f"{length:g} cannot be made of what is stored")
        shown = _pictures(found[length], seeds) if length in found else missing
        parts.append(f'<div data-length="{length:g}">{shown}</div>')
    return f"<article><h3>{escape(name)}</h3>{''.join(parts)}</article>"


def _pictures(strip: Strip, seeds: Sequence[int]) -> str:
    kind = ' class="pixelated"' if is_pixelated(strip.images[0]) else ""
    length = strip.made.partition(",")[0]
    pictures = "".join(
        f'<img{kind} src="{picture_url(image)}" alt="seed {seed}{"" if label < 0 else f", class {label}"}, '
        f'length {length}" width="{image.shape[2]}" height="{image.shape[1]}">'
        for seed, label, image in zip(seeds, strip.classes.tolist(), strip.images, strict=True)
    )
    return f'<p>{escape(strip.made)}</p><div class="pictures">{pictures}</div>'
