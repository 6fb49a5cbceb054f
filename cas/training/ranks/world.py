"""The processes that train together, and how they wait for each other. They exchange little: data goes by the store."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch

from cas.errors import CasError, RunError, UserError
from cas.training.pipeline import Stop, Stopped, View
from cas.training.ranks import launched

_T = TypeVar("_T")
_PATIENCE = timedelta(days=30)  # ranks wait for the slowest; one that is lost closes its connections at once


@dataclass
class World:
    """This process among all. ``before_waiting``: what ranks that share a model have to do first (:mod:`.zero`)."""

    rank: int = 0
    size: int = 1
    before_waiting: Callable[[], None] | None = None

    @property
    def device(self) -> torch.device:
        """This rank's GPU, or the CPU where there is none."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is the one that writes into the store and speaks to the user."""
        return self.rank == 0

    def exchange(self, value: Any) -> list[Any]:
        """What every rank gives here (anything that JSON can say), by rank. Raises: RunError if a rank is lost."""
        if self.before_waiting is not None:
            self.before_waiting()
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        given = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        try:
            dist.all_gather(lengths, torch.tensor([len(given)]))
            longest = max(map(int, lengths))
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(texts, torch.nn.functional.pad(given, (0, longest - len(given))))
        except RuntimeError as error:
            raise RunError(
                "another rank is lost; all checkpoints are saved: run the same command again, on as many ranks as you like"
            ) from error
        return [json.loads(text[: int(n)].numpy().tobytes()) for text, n in zip(texts, lengths, strict=True)]

    def at_first(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do this on the first rank, while the others wait. Raises: as :meth:`together`."""
        self.together(work if self.first else lambda *_: None, *arguments)

    def together(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """Do this on every rank, and wait for all. Returns: this rank's result.

        Raises: where any rank failed or was stopped, its CasError or Stopped on the first rank, SystemExit on others.
        """
        failure: CasError | Stopped | None = None
        result: _T | None = None
        try:
            result = work(*arguments)
        except (CasError, Stopped) as error:
            failure = error
        about = None
        if failure is not None:
            about = [getattr(failure, "exit_status", 0), str(failure)]
        failures = [(rank, *said) for rank, said in enumerate(self.exchange(about)) if said is not None]
        if not failures:
            return cast(_T, result)
        rank, status, line = max(failures, key=lambda f: (f[1] > 0, -f[0]))  # an error rather than a stop
        if not self.first:
            raise SystemExit(status or 130)
        if rank == self.rank and failure is not None:
            raise failure
        if not status:
            raise Stopped
        raise (UserError if status == UserError.exit_status else RunError)(f"rank {rank}: {line}")


@contextmanager
def join(zero: bool = False) -> Iterator[World]:
    """The world that the launcher's environment describes; alone without one. ``zero``: GPUs also need NCCL."""
    if not launched():
        yield World()
        return
    import torch.distributed as dist

    local = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if world.size == 1 and not zero:
        yield world
        return
    backend = "cpu:gloo,cuda:nccl" if zero and torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield world
    finally:
        dist.destroy_process_group()


class Quiet:
    """The view of a rank that says nothing."""

    def __init__(self, view: View) -> None:
        self.view = view

    def line(self, text: str) -> None:
        pass

    warn = say = line

    def show(self, done: int, total: int, note: str = "") -> None:
        pass

    @contextmanager
    def progress(self, title: str) -> Iterator[Quiet]:
        yield self

    waiting = progress

    def listening(self) -> AbstractContextManager[Stop]:
        return self.view.listening()
