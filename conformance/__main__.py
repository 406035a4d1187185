"""``python -m conformance --port pkg.adapter:PORT``: prove ports; ask one question again; write what machines write.

Whatever is not listed by ``--help`` goes to pytest.
"""

import argparse
import subprocess
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m conformance", description=__doc__, allow_abbrev=False, epilog="More: pytest's own options."
    )
    parser.add_argument("--port", action="append", metavar="NAME", help="a registered name, module:ATTRIBUTE, or core")
    parser.add_argument("--case", help="ask only this case, as the report names it")
    parser.add_argument("--example", metavar="JSON", help="with --case: this one example, as a failure prints it")
    parser.add_argument("--contract", action="store_true", help="write the cases of each clause into SPEC.md")
    parser.add_argument("--wrong-ports", metavar="FILE", help="write the page of seeded wrong ports and their catchers")
    parser.add_argument("--readme", nargs=2, metavar=("REPORT", "FILE"), help="put the table of report.json into FILE")
    given, rest = parser.parse_known_args(arguments)
    if given.contract:
        return _contract()
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
    ports = [f"--port={name}" for name in given.port or ()]
    one = ["-k", f"test_port and {given.case}"] if given.case else []
    # in a process of its own: pytest rewrites the assertions of modules that it imports first
    suite = ["--pyargs", "conformance", "-p", "conformance.plugin"]
    return subprocess.call([sys.executable, "-m", "pytest", *suite, *ports, *one, *rest])


def _contract() -> int:
    import edm2_core
    from conformance import cases

    path = Path(edm2_core.__file__).parent / "SPEC.md"
    path.write_text(cases.with_cases(cases.spec_text()), encoding="utf-8")
    return 0


def _ask(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    """One example of one case, without pytest or Hypothesis: what a failing line reproduces."""
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
