"""Parsing of command lines: tyro fills option dataclasses, with one reader for each type and a one-line message for
each error. Defaults are those of the dataclass, or of an instance of it."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from math import isnan
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from backends.pipeline.checkpoints.remote import is_url, url_of
from edm2_core.errors import InputError

T = TypeVar("T")
_UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
_FLAT = (
    tyro.conf.OmitArgPrefixes,
    tyro.conf.SuppressFixed,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.AvoidSubcommands,
)


def parse_count(text: str, /) -> int:
    """A whole number, perhaps with a binary unit: '96', '192Ki', '1.5Mi'. Raises ValueError for any other text."""
    unit = _UNITS.get(text[-2:], 1)
    value = float(text[:-2] if unit > 1 else text) * unit
    if not value.is_integer():
        raise ValueError(text)
    return int(value) if unit > 1 or not text.lstrip("+-").isdecimal() else int(text)


def count_text(count: int, /) -> str:
    """The shortest text that :func:`parse_count` reads back: 196608 is '192Ki'."""
    unit = next((name for name, size in reversed(_UNITS.items()) if count and count % size == 0), "")
    return f"{count // _UNITS.get(unit, 1)}{unit}"


def flag(name: str, /) -> str:
    """The spelling of the field ``name`` on the command line."""
    return "--" + {"label": "class", "config_file": "config"}.get(name, name.replace("_", "-"))


# ---- readers


class _Unreadable(Exception):
    """Words that break a reader's rule. Not a ValueError: tyro would print that over several lines."""

    def __init__(self, rule: str, words: list[str]) -> None:
        super().__init__(rule)
        self.rule, self.words = rule, words


def reader(
    read: Callable[[str], Any], metavar: str, rule: str, *, nargs: int | Literal["*"] = 1, optional: bool = False
) -> Any:
    """How tyro reads the words after a flag: ``read`` converts each, and raises ValueError if a word breaks ``rule``.

    With ``nargs`` other than 1 the value is a tuple. The word none gives None if the value is ``optional``.
    """

    def convert(words: list[str]) -> Any:
        if optional and words == ["none"]:
            return None
        try:
            if not words:
                raise ValueError
            values = tuple(map(read, words))
        except (ValueError, OverflowError) as error:  # OverflowError: a count of inf
            raise _Unreadable(rule, words) from error
        return values[0] if nargs == 1 else values

    def text(value: Any) -> list[str]:
        values = value if isinstance(value, tuple) else (value,)
        return [count_text(v) if type(v) is int else "none" if v is None else str(v) for v in values] or ["none"]

    return PrimitiveConstructorSpec(
        nargs=nargs, metavar=metavar, instance_from_str=convert, is_instance=lambda _: True, str_from_instance=text
    )


def _number(text: str) -> float:
    if isnan(value := float(text)):
        raise ValueError(text)
    return value


_READERS: dict[Any, tuple[Callable[[str], Any], str, str]] = {
    int: (parse_count, "INT", "a whole number such as 96, 192Ki, 1.5Mi or 2Gi"),
    float: (_number, "FLOAT", "a number"),
    str: (str, "TEXT", "text"),
    Path: (Path, "PATH", "a path"),
}

_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _by_type(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """The reader of a type: int, float, str, Path, a Literal of words, a tuple of one type, or any of these or None."""
    kind: Any = info.type
    optional = False
    if get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind):
        members = [member for member in get_args(kind) if member is not NoneType]
        kind, optional = (members[0] if len(members) == 1 else None), True
    if get_origin(kind) is Literal:
        words = get_args(kind)
        rule = f"one of {', '.join(words)}"
        return reader(lambda text: words[words.index(text)], f"{{{','.join(words)}}}", rule, optional=optional)
    if get_origin(kind) is tuple and get_args(kind)[0] in _READERS:
        element, *others = get_args(kind)
        read, metavar, rule = _READERS[element]
        if others == [Ellipsis]:
            return reader(read, f"{metavar} [{metavar} ...]", f"one or more of: {rule}", nargs="*", optional=optional)
        count = 1 + len(others)
        return reader(read, " ".join([metavar] * count), f"{count} of: {rule}", nargs=count, optional=optional)
    if kind not in _READERS:
        return None
    return reader(*_READERS[kind], optional=optional and kind in (int, float))


_WRITTEN = ("outdir", "out", "dest", "save", "picture")  # options that name what a command writes


def parse(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    default: T | None = None,
    writes_to_urls: bool = False,
) -> T:
    """The options in ``argv`` (None: ``sys.argv``), with defaults from ``default``.

    Raises:
        InputError: a value cannot be read, or ``cls`` refuses it; or a URL of what is written, unless
            ``writes_to_urls``. The message names the flag.
        SystemExit: 0 after ``--help``, 2 for an unknown flag.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        options: Any = _read(cls, words, prog=prog, description=description, default=default)
        for name in _WRITTEN:
            value = getattr(options, name, None)
            if isinstance(value, Path) and is_url(value) and not writes_to_urls:
                raise InputError(
                    f"{name} must be local, got {url_of(value)}: of all that is written, only the --outdir of training "
                    "may be a URL"
                )
        return cast(T, options)
    except InputError as error:
        raise InputError(_with_flag(str(error), cls)) from error


def parse_some(cls: type[T], words: Sequence[str], /, *, prog: str) -> T:
    """The options of ``cls`` in ``words``, which may have others too. Raises InputError: a value cannot be read."""
    options, _ = _read(cls, list(words), prog=prog, return_unknown_args=True)
    return cast(T, options)


def _read(cls: Any, words: list[str], **options: Any) -> Any:
    try:
        return tyro.cli(cls, args=words, config=_FLAT, registry=_REGISTRY, **options)
    except _Unreadable as error:
        raise InputError(
            f"{_flag_before(error.words, words)} must be {error.rule}, got {' '.join(error.words)!r}"
        ) from error


def flags_given(words: Sequence[str], /) -> set[str]:
    """Names of the options that ``words`` set, with underscores for dashes."""
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def _flag_before(values: Sequence[str], words: Sequence[str]) -> str:
    """The flag whose value is ``values``, as ``--flag=value`` or ``--flag value``; several flags if they share it."""
    flags = []
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.startswith("--") and ([value] if equals else list(words[i + 1 : i + 1 + len(values)])) == list(values):
            flags.append(name)
    return " or ".join(flags) or "each value"


def _with_flag(message: str, cls: Any) -> str:
    """``message``, with its first word spelled as a flag if it is the name of a field."""
    name, space, rest = message.partition(" ")
    return f"{flag(name)}{space}{rest}" if name in _names(cls) else message


def _names(cls: Any) -> set[str]:
    """Names of the fields of a dataclass and of the dataclasses nested in it."""
    types = {field.name: field.type for field in fields(cls)}
    kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in types.values()]
    return set(types).union(*(_names(kind) for kind in kinds if is_dataclass(kind)))


_MOST_SEEDS = 10_000_000


def parse_seeds(text: str, /) -> list[int]:
    """The seeds of a list such as ``0-63,70``, in that order; ranges include both ends.

    Raises:
        InputError: invalid text, a repeated seed, or more than ten million seeds.
    """

    def fault(got: str) -> InputError:
        return InputError(f"seeds must be numbers and ranges such as 0-63,70, got {got}: correct the list")

    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", part)
        if not match:
            raise fault(f"{part!r:.80}" + (f" in {text!r:.80}" if part != text else ""))
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise fault(f"{part.strip()}, which runs backwards")
        if len(seeds) + last - first >= _MOST_SEEDS:
            raise fault(f"more than {_MOST_SEEDS} of them")
        seeds.extend(range(first, last + 1))
    if len(set(seeds)) < len(seeds):
        raise fault(f"{text!r:.80}, which names a seed twice")
    return seeds
