"""The note about narrow precisions that a machine computes slowly."""

import time
from dataclasses import dataclass

from backends.pipeline.runs.precision import say_if_slow


@dataclass
class Slow:
    """Takes longer in bfloat16, but not in float16."""

    precision: str = "float32"

    def denoise(self, *_):
        time.sleep(0.05 if self.precision == "bfloat16" else 0.002)


def test_a_precision_that_is_slow_here_is_said_and_no_other(capsys):
    for precision in ("float32", "float16"):
        say_if_slow(Slow(), precision)
        assert capsys.readouterr().out == ""
    say_if_slow(Slow(), "bfloat16")
    out = capsys.readouterr().out
    assert out.startswith("note     bfloat16 takes ")
    assert out.endswith(" times as long as float32 here: leave out --precision\n")


def test_float32_is_not_measured():
    say_if_slow(None, "float32")
