"""The command ``python -m conformance``: proves ports, repeats one example, and writes generated pages.

Options that ``--help`` does not list go to pytest.
"""

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SUITE = ("--pyargs", "conformance", "-p", "conformance.plugin")


def main(arguments: list[str] | None = None) -> int:
    if (message := _of_another_package()) is not None:
        print("error:", message, file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(
        prog="python -m conformance", description=__doc__, allow_abbrev=False, epilog="More: pytest's own options."
    )
    parser.add_argument("--port", action="append", metavar="NAME", help="a registered name, module:ATTRIBUTE, or core")
    parser.add_argument("--profile", metavar="NAME", help="dev, ci or deep: 20, 100 or 2000 examples per case")
    parser.add_argument("--report", metavar="FOLDER", help="write report.json, report.md and report.html there")
    parser.add_argument("--known-failures", metavar="FILE", help="TOML of known failures, see docs/adding_a_port.md")
    parser.add_argument("--case", help="ask only cases with this in their name")
    parser.add_argument("--example", metavar="JSON", help="with --case: this one example, as a failure prints it")
    parser.add_argument("--wrong-ports", metavar="FILE", help="write the page of wrong ports and what catches them")
    parser.add_argument("--readme", nargs=2, metavar=("REPORT", "FILE"), help="put the table of report.json into FILE")
    given, rest = parser.parse_known_args(arguments)
    if given.wrong_ports:
        from conformance import wrong_ports

        Path(given.wrong_ports).write_text(wrong_ports.page(), encoding="utf-8")
        return 0
    if given.readme:
        from conformance import report

        report.insert(Path(given.readme[0]), Path(given.readme[1]))
        return 0
    if given.example:
        return _ask(parser, given)
    # in a process of its own: pytest rewrites the assertions only of modules that it imports first
    return subprocess.call([sys.executable, "-m", "pytest", *SUITE, *_translated(given), *rest])


def _of_another_package() -> str | None:
    """What to do if Python finds another package called backends than edm2's."""
    import backends

    if find_spec("backends.pipeline") is not None:
        return None
    where = ", ".join(backends.__path__)
    return f"the package backends must be edm2's, got the one in {where}: use python -P -m conformance"


def _translated(given: argparse.Namespace) -> list[str]:
    """The options of this command as those of the plugin."""
    options = {"profile": given.profile, "report": given.report, "known-failures": given.known_failures}
    translated = [f"--edm2-port={name}" for name in given.port or ()]
    translated += [f"--edm2-{name}={value}" for name, value in options.items() if value is not None]
    return [*translated, *(("-k", f"test_port and {given.case}") if given.case else ())]


def _ask(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    """Ask one example of one case, without pytest and Hypothesis: the line that a failure prints."""
    from conformance import contract, measure, ports
    from conformance.cases import PORT_CASES

    named = {case.name: case for case in PORT_CASES}
    if given.case not in named or len(given.port or ()) != 1:
        parser.error(f"--example needs one --port and a --case of {', '.join(named)}, got {given.case}")
    record = measure.Record()
    try:
        with measure.recording(record):
            named[given.case].run(ports.load(given.port[0]), contract.from_json(given.example))
    except (ports.PortError, ports.NotImplementedByPort) as error:
        parser.error(str(error))
    except measure.Disagreement as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{given.case} holds: the worst error is {record.worst:.3g} times the tolerance ({record.at})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
