"""Training by several processes (*ranks*), started by ``torchrun`` or ``deepspeed``: data parallel over documents.

Every rank has a part of the documents in a store of its own (a *shard*), with its own pool and budget. Distractors come
from the rank's documents, so these are dealt out anew every so many steps. No gradient travels. In the end the shards'
cartridges are copied into the store. :mod:`.run` is the pipeline, :mod:`.deals` the documents' ways, :mod:`.world` the
processes, :mod:`.zero` the base model in parts.

This file must not import torch: the command line asks it what to import.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from cas.errors import ConfigError

FOLDER = "ranks"  # in the store, while it is trained by ranks


def launched() -> bool:
    """Whether a launcher of distributed jobs started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def wanted(store: Path, zero: int = 0) -> bool:
    """Whether a training is one of ranks, if only of the one that goes on with what several began.

    Args: zero: the stage asked for. Raises: ConfigError for what it needs.
    """
    if zero and find_spec("deepspeed") is None:
        raise ConfigError(f"--zero {zero} needs DeepSpeed: pip install 'cas-cartridges[deepspeed]', after PyTorch")
    if zero and not launched():
        raise ConfigError(
            f"--zero {zero} splits the model over ranks; start them: torchrun --nproc-per-node N -m cas.train …"
        )
    return launched() or (store / FOLDER).exists()


def world_size() -> int:
    """Ranks in all."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def ranks_here() -> int:
    """Ranks on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1) if launched() else 1


def command() -> list[str]:
    """The words that start Python as this process was started, to print."""
    return ["torchrun", "--nproc-per-node", str(ranks_here())] if launched() else ["python"]
