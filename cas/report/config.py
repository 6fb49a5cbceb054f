"""The options of ``cas report``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cas.options import Flag


@dataclass(frozen=True)
class Config:
    """RAG against CAS on one store."""

    store: str | None = None
    """The store; default $CAS_STORE, else the newest under runs/."""
    output: str = "runs/rag_vs_cas"
    """Folder of the report and results."""
    collection: str | None = None
    """The documents with questions; default what the store was trained on."""
    collection_seed: int | None = None
    """Seed of a generated collection; default as the store was trained."""
    model: str | None = None
    """Where the store's model is now, if it has moved: a folder, a .gguf file or a Hub name."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the model; default the recorded one."""
    name: str | None = None
    """Name of the report; default that of the collection."""
    ks: tuple[int, ...] = (1, 2, 4, 8)
    """Cartridges to retrieve."""
    budgets: tuple[int, ...] | None = None
    """Tokens of retrieved text, as far as the model's window goes; as many as the cartridges of each of --ks have, and
    three times as many, are added. Default: powers of two beyond those, up to four times the largest, or all text."""
    questions: int | None = None
    """Ask so many test questions; default all."""
    validation: int = 128
    """Questions to tune RAG on, at most a quarter of all; they are not asked again."""
    metric: Literal["exact_match", "contains", "f1", "rouge_l", "chrf"] | None = None
    """What decides; default exact_match for the embedded reader, else contains."""
    isolated: str | None = None
    """A store of the same documents trained with --isolation 1, to compare."""
    monolithic: str | None = None
    """A store of the same documents trained with --merge, to compare."""
    with_chunk_k: int = 4
    """Cartridges of the arm that has one chunk of text as well."""
    timed: int = 16
    """Questions that are timed, one at a time."""
    max_new_tokens: int = 32
    """Longest answer."""
    embedder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Hub name or folder of the embedding model, for both sides."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..."""
    price_hour: float | None = None
    """What an hour of this machine costs, in any currency: adds the price of 1,000 questions and of the training."""
    price_tokens: float | None = None
    """What a million tokens of prompt cost at a provider: adds the price of 1,000 questions of the arms that read text."""
    no_text: Flag = False
    """Write figures and ids only: no text of questions, answers or documents in any file."""
    seed: int = 0
    """Seed of the split into validation and test questions."""
