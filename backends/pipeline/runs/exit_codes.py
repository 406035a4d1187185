"""Exit codes of commands: 0; 2, with a one-line message, for invalid input; 128 + the signal after a signal."""

import atexit
import errno
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable
from functools import wraps
from io import TextIOWrapper
from types import FrameType, TracebackType
from typing import Any, NoReturn, ParamSpec, Self

from backends.pipeline.data.patience import Unanswered
from edm2_core.errors import InputError

P = ParamSpec("P")
_FRAMEWORKS = ("torch", "jax", "mlx")
_OF_COMMANDS = (
    "tyro",
    "tqdm",
    "PIL",
    "threadpoolctl",
    "numkong",
    "xxhash",
    "filelock",
    "typeguard",
    "matplotlib",
    "packaging",
)
_at_once = False
_status: int | None = None  # with which the process ends without finalization


def command(main: Callable[P, int | None], /) -> Callable[P, int]:
    """Decorator: ``main`` returns an exit status, for ``leave(main())``. Unexpected errors keep their traceback."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        atexit.register(_end)  # the first to be registered is the last to be called
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):  # names of files need not be text
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(*args, **kwargs) or 0
        except Unanswered as error:
            _fail(str(error))
            sys.stdout.flush()
            os._exit(2)  # the interpreter would wait for the thread
        except InputError as error:
            return _fail(str(error))
        except ImportError as error:
            if (framework := missing_framework(error)) is not None:
                return _fail(f"this command needs {framework}, which is not installed: {to_install(framework)}")
            if error.name not in _OF_COMMANDS:
                raise
            extras = "pip install 'edm2[torch]', 'edm2[jax]' or 'edm2[mlx]', or 'edm2[run]' without a framework"
            return _fail(f"this command needs {error.name}, which is not installed: {extras}")
        except BrokenPipeError:  # the reader closed our output: discard what is still buffered
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return _fail(f"there must be room to write, got '{error}': free some space or choose another --outdir")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT

    return run


def end_at_once() -> None:
    """Make :func:`leave` end this process without finalizing the interpreter. During finalization, a thread of gloo's
    that frees a tensor of PyTorch's aborts the process (pytorch/pytorch#190489)."""
    global _at_once
    _at_once = True


def leave(status: int, /) -> NoReturn:
    """End this process with ``status``, as ``sys.exit`` does: the last act of a command that has the process to
    itself. See :func:`end_at_once`."""
    global _status
    _status = status if _at_once else None
    sys.exit(status)


def _end() -> None:
    if _status is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_status)


def missing_framework(error: ImportError, /) -> str | None:
    """The framework whose absence caused ``error``, or None. MLX on Linux may be installed without its CPU build."""
    if isinstance(error, ModuleNotFoundError):
        return error.name if error.name in _FRAMEWORKS else None
    return "mlx" if "libmlx" in str(error) else None


def to_install(framework: str, /) -> str:
    """What to do to have ``framework`` on this machine."""
    system, machine = platform.system(), platform.machine()
    if framework == "mlx" and system != "Linux" and (system, machine) != ("Darwin", "arm64"):
        return f"MLX does not support {system} on {machine}: use backends.torch or backends.jax"
    for_cpu = " (mlx[cpu] on Linux)" if framework == "mlx" and system == "Linux" else ""
    return f"pip install 'edm2[{framework}]'{for_cpu}"


def _fail(message: str) -> int:
    print("error:", _shown(" ".join(message.split())), file=sys.stderr)
    return 2


def _shown(text: str) -> str:
    """``text`` without what would command the terminal, or cannot be written: names of files may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_ENDS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))  # Windows has the first two


def _is_ignored(signum: int) -> bool:
    """Whether the run was started to survive it: nohup ignores the closing of the terminal."""
    return signum == getattr(signal, "SIGHUP", None) and signal.getsignal(signum) == signal.SIG_IGN


class Interrupts:
    """Context manager that stores the signal that asks the process to end in ``signum``, so that a loop can finish its
    step before it stops: SIGINT, SIGTERM, SIGHUP of a closed terminal, SIGQUIT, and SIGUSR1 and SIGUSR2, by which
    clusters announce the end.

    A SIGINT after another signal raises KeyboardInterrupt at once. In other threads than the main one it has no effect.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    @property
    def status(self) -> int:
        """The exit status: 128 + the signal, such as 130 after SIGINT; 0 without a signal."""
        return 0 if self.signum is None else 128 + self.signum

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heard = [signum for signum in _ENDS if not _is_ignored(signum)]
            self._before = {signum: signal.signal(signum, self._note) for signum in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
