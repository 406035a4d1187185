"""The report of a run: JSON, Markdown, and one self-contained HTML page."""

import json
import platform
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from html import escape
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from conformance import cases, profiles
from conformance.clauses import spec_clauses, spec_text

Results = list[dict[str, Any]]
START, END = "<!-- conformance table: made by python -m conformance --readme -->", "<!-- end of conformance table -->"
_WORST_FIRST = ("failed", "known failure", "passed", "not checked", "not implemented")


def of(session: Any) -> dict[str, Any]:
    """The report of a run, as plain data."""
    titles = spec_clauses()
    return {
        "versions": {
            "suite": metadata.version("edm2"),
            "spec": re.search(r"^# Specification, version (\S+)", spec_text())[1],  # type: ignore[index]
            "python": platform.python_version(),
            "hypothesis": metadata.version("hypothesis"),
        },
        "profile": profiles.current(),
        "machine": f"{platform.system()} {platform.machine()}",
        "subjects": {name: subject.versions() for name, subject in session.subjects.items()},
        "absent": session.absent,
        "clauses": [
            asdict(row) | {"title": titles[row.number], "cases": cases.cases_of(row.number)} for row in cases.CONTRACT
        ],
        "results": session.results,
    }


def summary(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Many results as one: the worst outcome, cases and examples that ran, and the largest ratio."""
    results = list(results)
    outcomes = {result["outcome"] for result in results}
    ran = [result for result in results if result["outcome"] in ("passed", "failed", "known failure")]
    ratios = [result["worst"] for result in ran if result["comparisons"] and result["worst"] is not None]
    return {
        "outcome": next((outcome for outcome in _WORST_FIRST if outcome in outcomes), ""),
        "cases": len(ran),
        "examples": sum(max(result["examples"], 1) for result in ran),
        "worst": max(ratios, default=None),
        "missing": sorted({result["why"] for result in results if result["outcome"].startswith("not ")}),
    }


def table(report: Mapping[str, Any]) -> tuple[list[str], list[tuple[dict[str, Any], list[dict[str, Any]]]]]:
    """The subjects that ran, and for each clause a summary per subject."""
    ran = {result["subject"] for result in report["results"]}
    subjects = [name for name in ("core", *report["subjects"]) if name in ran]
    rows = []
    for clause in report["clauses"]:
        per = [
            summary(r for r in report["results"] if r["subject"] == name and clause["number"] in r["clauses"])
            for name in subjects
        ]
        if any(cell["outcome"] for cell in per):
            rows.append((clause, per))
    return subjects, rows


def cell(total: Mapping[str, Any]) -> str:
    """One cell as text: the number of cases, and the worst error over its tolerance."""
    if total["outcome"] in ("", "not implemented", "not checked"):
        return total["outcome"] or "—"
    ratio = "" if total["worst"] is None else f" · {shown(total['worst'])}"
    mark = {"passed": "", "failed": "FAILED ", "known failure": "known "}[total["outcome"]]
    return f"{mark}{total['cases']}{ratio}"


def shown(ratio: float) -> str:
    return "<0.01" if 0 < ratio < 0.01 else f"{ratio:.2f}"


def headings(report: Mapping[str, Any], subjects: Iterable[str]) -> list[str]:
    """The name of each subject: what a port calls itself, or where two ports share that, what it was asked for as."""
    own = {name: port.get("name", name) for name, port in report["subjects"].items()}
    taken = Counter(own.values())
    called = {name: short if taken[short] == 1 else name for name, short in own.items()}
    return [{"core": "specification", **called}.get(name, name) for name in subjects]


def _called(report: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    return headings(report, [result["subject"]])[0]


def families(report: Mapping[str, Any]) -> str:
    """The table in short, as Markdown: a row for each family of clauses."""
    subjects, _ = table(report)
    names = dict.fromkeys(clause["number"].partition("-")[0] for clause in report["clauses"])
    lines = [_row(["clauses", *headings(report, subjects)]), _row(["---"] * (len(subjects) + 1))]
    for family in names:
        cells = [
            cell(summary(r for r in report["results"] if r["subject"] == name and _in(family, r["clauses"])))
            for name in subjects
        ]
        if set(cells) != {"—"}:
            lines.append(_row([family, *cells]))
    return "\n".join(lines)


def _in(family: str, clauses: Iterable[str]) -> bool:
    return any(clause.startswith(f"{family}-") for clause in clauses)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def legend(report: Mapping[str, Any]) -> str:
    versions = report["versions"]
    names = headings(report, report["subjects"])
    named = zip(names, report["subjects"].values(), strict=True)
    ports = "; ".join(f"{name} {v['port']} on {v['library']}" for name, v in named)
    return (
        f"Suite {versions['suite']}, SPEC version {versions['spec']}, profile {report['profile']}, Python "
        f"{versions['python']} on {report['machine']}{'; ' if ports else ''}{ports}."
    )


CELLS = (
    "A cell is the number of cases that ran and the worst error over its tolerance, a ratio that must be at most 1. "
    "Without a ratio, its cases are exact or have tolerances of their own."
)


def markdown(report: Mapping[str, Any]) -> str:
    subjects, rows = table(report)
    lines = ["# Conformance", "", legend(report), "", CELLS, ""]
    lines += [_row(["clause", *headings(report, subjects)]), _row(["---"] * (len(subjects) + 1))]
    lines += [_row([f"{c['number']} {c['title']}", *map(cell, per)]) for c, per in rows]
    lines += ["", "## Cases of each clause", ""]
    lines += [f"- {c['number']}: {'; '.join(c['cases'])}." for c, _ in rows]
    if report["absent"]:
        lines += ["", *(f"Absent: {name}, {why}." for name, why in report["absent"].items())]
    missing = [r for r in report["results"] if r["outcome"].startswith("not ")]
    if missing:
        lines += ["", "## Not implemented, not checked", ""]
        lines += [f"- {_called(report, r)}: {r['case']}: {r['why']}" for r in missing]
    for result in report["results"]:
        if result["failure"]:
            lines += ["", f"## {result['outcome']}: {result['case']} of {_called(report, result)}", "", "```"]
            lines += [f"{heading}: {text}" for heading, text in result["failure"].items()] + ["```"]
    return "\n".join(lines) + "\n"


def html(report: Mapping[str, Any]) -> str:
    subjects, rows = table(report)
    names = headings(report, subjects)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = []
    for clause, per in rows:
        facts = f"{clause['draws']}. Compared with {clause['oracle']}. To {clause['tolerance']}."
        title = f"<td><details><summary><b>{clause['number']}</b> {escape(clause['title'])}</summary>"
        title += f"<p>{escape(facts)}</p><p class=cases>{escape('; '.join(clause['cases']))}</p></details></td>"
        body.append(f"<tr>{title}{''.join(map(_cell_html, names, per))}</tr>")
    failures = "".join(_failure_html(report, r) for r in report["results"] if r["failure"])
    missing = "".join(
        f"<li><b>{escape(_called(report, r))}</b> {escape(r['case'])}: {escape(r['why'])}</li>"
        for r in report["results"]
        if r["outcome"].startswith("not ")
    )
    missing += "".join(f"<li><b>{escape(name)}</b>: {escape(why)}</li>" for name, why in report["absent"].items())
    counts = "".join(_count_html(name, report) for name in subjects)
    return Template(files("conformance").joinpath("report.html").read_text(encoding="utf-8")).substitute(
        legend=escape(legend(report)),
        cells=escape(CELLS),
        counts=counts,
        head=head,
        body="\n".join(body),
        failures=f"<h2>What failed</h2>{failures}" if failures else "",
        missing=f"<h2>Not implemented, not checked</h2><ul>{missing}</ul>" if missing else "",
    )


def _cell_html(name: str, total: Mapping[str, Any]) -> str:
    kind = total["outcome"].replace(" ", "-") or "none"
    title = "; ".join(total["missing"]) or f"{total['examples']} examples"
    return f'<td class="{kind}" data-port="{escape(name)}" title="{escape(title)}">{escape(cell(total))}</td>'


def _count_html(name: str, report: Mapping[str, Any]) -> str:
    results = [r for r in report["results"] if r["subject"] == name]
    total = summary(results)
    failed = sum(r["outcome"] == "failed" for r in results)
    versions = report["subjects"].get(name, {"port": report["versions"]["suite"], "library": "five array libraries"})
    state = f"{failed} failed" if failed else "all held"
    worst = "" if total["worst"] is None else f", worst ratio {shown(total['worst'])}"
    (heading,) = headings(report, [name])
    return (
        f'<div class="card {"failed" if failed else "passed"}"><b>{escape(heading)}</b> {escape(versions["port"])}<br>'
        f"<small>{escape(versions['library'])}</small><br>{total['cases']} cases, {total['examples']} examples: "
        f"{state}{worst}</div>"
    )


def _failure_html(report: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    facts = "".join(
        f"<dt>{escape(heading)}</dt><dd>{escape(text)}</dd>"
        for heading, text in result["failure"].items()
        if heading != "summary"
    )
    title = f"{_called(report, result)}: {result['case']} ({result['outcome']})"
    return f"<section><h3>{escape(title)}</h3><p>{escape(result['failure']['summary'])}</p><dl>{facts}</dl></section>"


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """report.json, report.md and report.html in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(html(report), encoding="utf-8")


def insert(source: Path, target: Path) -> None:
    """Put the short table of a report.json between the two marks of ``target``."""
    report, text = json.loads(source.read_text(encoding="utf-8")), target.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    made = f"{START}\n{families(report)}\n\n{legend(report)} {CELLS}\n{END}"
    target.write_text(before + made + after, encoding="utf-8")
