"""``python -m cas.train --collection FOLDER``: documents in, a collection of trained cartridges out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager

from cas import console
from cas.options import TrainConfig, parse, store_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and train. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    again = shlex.join(["python", "-m", "cas.train", *arguments])
    return console.run(lambda: train(parse(TrainConfig, "python -m cas.train", arguments), again))


def train(config: TrainConfig, again: str) -> int:
    """Run :mod:`cas.training.pipeline`, with results on stdout and progress on stderr.

    ``again``: the command that goes on, to print when interrupted. Returns the exit status.
    """
    from cas.training import pipeline

    view = _Console()
    try:
        pipeline.run(config, view)
    except pipeline.Stopped:
        view.warn(f"interrupted, saved; go on with:\n  {again}")
        return view.interrupt.exit_status
    if not config.dry_run:
        store = store_folder(config.store, config.collection)
        view.line(
            f'store       {store}; ask it: python -m cas.query --store {shlex.quote(str(store))} --retrieve-k 4 "..."'
        )
    return 0


class _Console:
    """The view of a run in a terminal (:class:`cas.training.pipeline.View`)."""

    def __init__(self) -> None:
        self.interrupt = console.Interrupt()

    def line(self, text: str) -> None:
        print(text, flush=True)

    def warn(self, text: str) -> None:
        print(text, file=sys.stderr)

    def progress(self, title: str) -> console.Display:
        return console.Display(title)

    def listening(self) -> AbstractContextManager[console.Interrupt]:
        return self.interrupt.listening()


if __name__ == "__main__":
    sys.exit(main())
