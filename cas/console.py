"""What all command lines share: one line for an error, the exit status, Ctrl-C, harmless output, progress on stderr."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from cas.errors import CasError

# Errors of other packages that end a command with one line: {package.class: exit status}, by name so that none is imported.
_FOREIGN = {
    "retrieval.EmbedderUnavailable": 2,
    "lmdb.Error": 1,
    "torch.OutOfMemoryError": 1,
    "builtins.MemoryError": 1,
    "builtins.OSError": 1,
}
# What steers a terminal: control characters but tab and newline, line separators, changes of the writing direction; and
# lone surrogates, which cannot be written.
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def run(main: Callable[[], int]) -> int:
    """Call a command and turn what it raises, or warns of, into one line on stderr and an exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.getfilesystemencoding().lower() != "utf-8":
        complain("names of files are not read as UTF-8 here; set PYTHONUTF8=1 in the environment")
        return 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(errors="backslashreplace")  # an answer that cannot be written whole is still one
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|sentence_transformers|torch)\b.*")
            warnings.showwarning = lambda message, *_, **__: complain(str(message))
            return main()
    except CasError as error:
        complain(str(error))
        return error.exit_status
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        names = [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__]
        status = next((_FOREIGN[name] for name in names if name in _FOREIGN), None)
        if status is None:
            raise
        complain(_reason(error))
        return status


def complain(line: str) -> None:
    """Print a mistake or a warning on stderr."""
    print(f"cas: {harmless(line)}", file=sys.stderr)


def _reason(error: Exception) -> str:
    """One line of an error that is not ours, with the file's name if it has one."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory"
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def harmless(text: str) -> str:
    """Text without the characters that could steer a terminal; all others, such as no-break spaces, are kept."""
    return _STEERS.sub("\ufffd", text)


def to_json(value: Any) -> str:
    """JSON on one line that is as harmless; its reader gets every character back."""
    return _STEERS.sub(lambda m: f"\\u{ord(m[0]):04x}", json.dumps(value, ensure_ascii=False))


class Interrupt:
    """Ctrl-C or SIGTERM: the first asks the work to stop at the next safe place, a second one stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        """Whether the work has been asked to stop."""
        return self.signal is not None

    def _handle(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print(
            "\nstopping at the next safe place, which may take minutes before training begins; again to stop at once",
            file=sys.stderr,
        )

    @contextlib.contextmanager
    def listening(self) -> Iterator[Interrupt]:
        """Handle the signals inside; the former handlers come back."""
        before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.signal or 0)


SECONDS_BETWEEN_LINES = 30.0  # of progress where stderr is no terminal


class Display:
    """Progress on stderr with rate and time left: a bar in a terminal, elsewhere a plain line every half minute.

    ``passing``: the bar shows what is waited for and how long, and leaves nothing behind.
    """

    def __init__(self, title: str, passing: bool = False) -> None:
        self.title, self.passing = title, passing
        self._state: tuple[int, int, str] | None = None  # as given to show()
        self._first = 0  # what was done when the rate began to be measured
        self._end = threading.Event()

    def __enter__(self) -> Display:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        columns = [progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[note]}")]
        columns += [progress.TimeRemainingColumn(compact=True), progress.TextColumn("left")]
        self._progress = progress.Progress(  # fits into 80 columns
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=8),
            *([progress.TimeElapsedColumn()] if self.passing else columns),
            console=console,
            transient=self.passing,
            disable=not console.is_terminal,
        )
        self._progress.start()
        self._task = self._progress.add_task(self.title, total=None, note="")
        self._entered = self._started = time.monotonic()
        if not console.is_terminal:
            threading.Thread(target=self._write_lines, daemon=True).start()
        return self

    def show(self, done: int, total: int, note: str = "") -> None:
        """Set how much is done, of how much."""
        # What is done at first, or at once, an earlier run did: it says nothing about the rate.
        if self._state is None or time.monotonic() - self._entered < 2:
            self._first, self._started = done, time.monotonic()
        self._state = done, total, note
        self._progress.update(self._task, completed=done, total=total, note=note)

    def say(self, line: str) -> None:
        """A line above the bar, on stderr."""
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._progress.stop()

    def _write_lines(self) -> None:
        while not self._end.wait(SECONDS_BETWEEN_LINES):
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        if self._state is None:
            return f"{self.title:<11} {duration(seconds)} so far"
        done, total, note = self._state
        line, rate = f"{self.title:<11} {done} of {total}", (done - self._first) / max(seconds, 1e-9)
        if rate > 0:
            line += f", {rate * 60:.3g} a minute, about {duration((total - done) / rate)} left"
        return f"{line}; {note}" if note else line


def duration(seconds: float) -> str:
    """A time in words: "40 seconds", "7 minutes", "2.5 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
