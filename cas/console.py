"""What all command lines share: one line for an error, the exit status, Ctrl-C, progress on stderr."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from cas.errors import CasError


def run(main: Callable[[], int]) -> int:
    """Call a command and turn what it raises, or warns of, into one line on stderr and an exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(transformers|sentence_transformers|torch)\b.*")
            warnings.showwarning = lambda message, *_, **__: print(f"cas: {message}", file=sys.stderr)
            return main()
    except CasError as error:
        print(f"cas: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("cas: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; keep Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class Interrupt:
    """Ctrl-C or SIGTERM: the first asks the work to stop at the next safe place, a second one stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        """Whether somebody wants us to stop."""
        return self.signal is not None

    def _heard(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print("\nstopping at the next safe place; again to stop at once", file=sys.stderr)

    @contextlib.contextmanager
    def listening(self) -> Iterator[Interrupt]:
        """Handle the signals inside; the former handlers come back."""
        before = {s: signal.signal(s, self._heard) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.signal or 0)


class Display:
    """A progress bar with rate and time left on stderr; silent when stderr is no terminal."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __enter__(self) -> Display:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._progress = Progress(  # fits into 80 columns
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
        )
        self._progress.start()
        self._task = self._progress.add_task(self.title, total=None, note="")
        return self

    def show(self, done: int, total: int, note: str = "") -> None:
        """Set how much is done, of how much."""
        self._progress.update(self._task, completed=done, total=total, note=note)

    def say(self, line: str) -> None:
        """A line above the bar, on stderr."""
        self._progress.console.print(line, highlight=False, markup=False)

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()
