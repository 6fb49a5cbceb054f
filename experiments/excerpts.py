"""The beginnings of a named collection's shortest documents, as a folder that ``cas.train`` reads.

    python -m experiments.excerpts --collection squad_dev_v1 --shortest 12 --words 250 --output excerpts/squad12

Documents and questions are copied from the collection (under ``$CAS_DATA``): the folder is theirs, not ours.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cas import console
from cas.options import parse


@dataclass(frozen=True)
class Config:
    """Write the beginnings of a collection's shortest documents, and the questions about them."""

    collection: str = "squad_dev_v1"
    """A named collection whose questions stand in the order of the text."""
    shortest: int = 12
    """How many documents, the shortest first."""
    words: int = 250
    """Words of an excerpt, in whole paragraphs; at least one paragraph."""
    output: str = "excerpts"
    """The folder."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder. Returns the exit status."""
    return console.run(lambda: write(parse(Config, "python -m experiments.excerpts", arguments)))


def write(config: Config) -> int:
    """Cut, and write documents.jsonl and questions.jsonl."""
    from cas.data.collection import Collection, save_jsonl
    from experiments.claims.joint_vs_isolated import excerpts, shortest

    cut = excerpts(shortest(Collection.load(config.collection), config.shortest), config.words)
    save_jsonl(cut, config.output)
    print(f"written     {config.output}: {len(cut)} documents, {len(cut.questions)} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
