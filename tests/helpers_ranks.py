"""Trainings by several ranks over a tiny model. As a program it is one rank, for launchers: helpers_ranks.py OPTION ...;
imported, it forks the ranks, which saves their imports."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from conftest import TEXTS
from helpers_writer import prepare

from cas import train
from cas.training.trainer import Trainer

OPTIONS = [
    "--collection", "manuals", "--tokens", "16", "--conversations", "40", "--steps", "16", "--pool", "2", "--targets", "1",
    "--per-target", "2", "--rotate-every", "2", "--isolation", "0.5", "--guests", "1", "--lr", "0.01",
    "--checkpoint-every", "2", "--exchange-every", "4",
]  # fmt: skip


MORE = {
    "buoy": "The red buoy marks the sandbank. It was painted in March and its bell rings in every swell.",
    "shed": "The net shed has two doors. The key of the small one hangs behind the barometer in the office.",
}


def write_manuals(folder: Path, texts: Mapping[str, str] = TEXTS) -> None:
    """Five documents, or these."""
    (folder / "manuals").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / "manuals" / f"{name}.md").write_text(f"# The {name}\n\n{text}\n")


def rank(words: Sequence[str], die_at: int | None = None) -> int:
    """What one rank does, in the folder with the manuals. ``die_at``: a step at which it is killed."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        if die_at is not None:
            train_step = Trainer.train_step

            def dying(self: Trainer, step: int, work: object) -> object:
                if step == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return train_step(self, step, work)  # type: ignore[arg-type]

            patch.setattr(Trainer, "train_step", dying)
        return train.main([*OPTIONS, *words])


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def fork(folder: Path, size: int, *words: str, dies: int | None = None, die_at: int = 0) -> list[int]:
    """Train with ``size`` ranks and wait. Rank ``dies`` is killed at step ``die_at``; then the others get SIGTERM, as from
    torchrun. Returns: exit statuses; -9 for a killed one. Their output is in ``folder/rank-N.log``."""
    port = free_port()
    sys.stdout.flush()
    children = []
    for number in range(size):
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.chdir(folder)
                log = os.open(f"rank-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.environ |= {
                    "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
                status = rank(words, die_at if number == dies else None)
            except SystemExit as stop:
                status = int(stop.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(pid)
    statuses = dict[int, int]()
    while len(statuses) < size:
        for pid in [pid for pid in children if pid not in statuses]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            statuses[pid] = os.waitstatus_to_exitcode(status)
            if statuses[pid] < 0:
                for other in [pid for pid in children if pid not in statuses]:
                    os.kill(other, signal.SIGTERM)
        time.sleep(0.02)
    return [statuses[pid] for pid in children]


def main(base: Path, *names: str) -> None:
    """``whole``: a training by two ranks. ``again``, ``fewer``: the same, of which one is killed, gone on with by two or
    by one. ``round``: a whole one, and the next round of it. ``four``: by four ranks."""
    for name in names:
        write_manuals(base / name)
        ranks = {"fewer": 1, "four": 4}.get(name, 2)
        if name in ("again", "fewer"):
            lost = fork(base / name, 2, dies=1, die_at=5)
            assert lost[0] != 0 and lost[1] == -signal.SIGKILL, lost
            assert (base / name / "runs/manuals/ranks/deal.json").exists()
        assert fork(base / name, ranks) == [0] * ranks, name
        if name == "round":
            shutil.copytree(base / name / "runs/manuals", base / name / "runs/before")
            write_manuals(base / name, MORE)
            assert fork(base / name, ranks) == [0] * ranks, name


if __name__ == "__main__":
    if "RANK" in os.environ:
        sys.exit(rank(sys.argv[1:]))
    main(Path(sys.argv[1]), *sys.argv[2:])
