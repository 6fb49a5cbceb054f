"""``python -m cas.train --collection FOLDER``: documents in, a collection of trained cartridges out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from cas import console
from cas.training import ranks

if TYPE_CHECKING:
    from cas.options import TrainConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the options and train. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = [word for word in arguments if not word.startswith("--local_rank=")]  # which deepspeed adds

    def run() -> int:
        from cas.options import TrainConfig, parse  # here, so that Ctrl-C ends the imports as it ends the rest

        config = parse(TrainConfig, "python -m cas.train", arguments)
        return train(config, shlex.join([*ranks.command(), "-m", "cas.train", *arguments]))

    return console.run(run)


def train(config: TrainConfig, again: str) -> int:
    """Run :mod:`cas.training.pipeline`, or the one of :mod:`cas.training.ranks`, with results on stdout and progress on
    stderr.

    ``again``: the command that goes on, to print when interrupted. Returns the exit status.
    """
    view = _Console()
    with view.waiting("loading"):
        from cas.options import store_folder
        from cas.training import pipeline
    try:
        if config.collection is not None and ranks.wanted(store_folder(config.store, config.collection), config.zero):
            from cas.training.ranks import run as ranks_pipeline

            ranks_pipeline.run(config, view)
        else:
            pipeline.run(config, view)
    except pipeline.Stopped:
        view.warn(f"interrupted, saved; go on with:\n  {again}")
        return view.interrupt.exit_status
    except KeyboardInterrupt:  # a second Ctrl-C: what was saved last is what there is
        view.warn(f"interrupted at once; go on with:\n  {again}")
        return 130
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

    def waiting(self, title: str) -> console.Display:
        return console.Display(title, passing=True)

    def listening(self) -> AbstractContextManager[console.Interrupt]:
        return self.interrupt.listening()


if __name__ == "__main__":
    sys.exit(main())
