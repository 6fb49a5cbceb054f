"""Arms, the ways of answering a question: what stands where the document goes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from cas.errors import UserError

Kind = Literal[
    "no_context",  # the question alone
    "full_document",  # the text of the gold documents
    "oracle",  # the cartridges of the gold documents
    "loaded",  # every cartridge of the store; with k: the gold ones and others, k in all
    "absent",  # k cartridges, none of them a gold one
    "retrieved",  # the k best cartridges by retrieval
    "rag",  # the best chunks of text by retrieval
    # The arms below are those of cas.report, which has its own names for loaded and retrieved ones.
    "cas",  # the k best cartridges by retrieval
    "all_resident",  # every cartridge of the store
    "monolithic",  # one cartridge of the whole collection
    "truncated",  # the text of the collection, cut at the window
    "compressed",  # the pruned KV of the gold documents
]
Retriever = Literal["vectors", "hybrid"]
_NEED_K = ("absent", "retrieved", "cas")
_OPTIONS: dict[str, tuple[str, Any]] = {  # the end of a name -> the field that it sets
    "nearest": ("others", "nearest"),
    "reversed": ("order", "reversed"),
    "hybrid": ("retriever", "hybrid"),
    "chunk": ("chunk", True),
}
_NAME = re.compile(
    rf"(?:(?P<training>[\w=+-]+?)_)?(?P<kind>{'|'.join(get_args(Kind))})(?P<number>\d+)?"
    rf"(?:_(?P<option>{'|'.join(_OPTIONS)}))?"
)


@dataclass(frozen=True)
class Arm:
    """One arm. ``str(arm)`` is its name in results, such as ``loaded10_reversed``; :meth:`parse` reads that name."""

    kind: Kind
    k: int | None = None
    """Number of cartridges (``loaded``, ``absent``, ``retrieved``, ``cas``)."""
    size: int | None = None
    """Of ``rag``: words of a chunk; in the report, tokens of text."""
    others: Literal["random", "nearest"] = "random"
    """Which cartridges are loaded beside the gold ones: drawn at random, or the next best by retrieval."""
    order: Literal["sorted", "reversed"] = "sorted"
    """Whether cartridges are in the order of training (by id), or reversed."""
    retriever: Retriever = "vectors"
    """Retrieval by vectors alone, or by vectors and words (BM25)."""
    chunk: bool = False
    """Of ``cas``: whether one chunk of text is in the prompt too."""
    training: str = ""
    """The training whose cartridges are loaded, where there are several."""

    def __str__(self) -> str:
        number = self.k if self.size is None else self.size
        options = [option for option, (field, value) in _OPTIONS.items() if getattr(self, field) == value]
        parts = [self.training, f"{self.kind}{'' if number is None else number}", *options]
        return "_".join(part for part in parts if part)

    @classmethod
    def parse(cls, name: str) -> Self:
        """The arm with this name. Raises UserError if there is none."""
        match = _NAME.fullmatch(name)
        kind, number = (match["kind"], match["number"]) if match else ("", None)
        if (
            match is None
            or (number is None and kind in _NEED_K)
            or (number and kind not in (*_NEED_K, "loaded", "rag"))
        ):
            raise UserError(f"there is no arm {name}; arms are {', '.join(get_args(Kind))}")
        fields: dict[str, Any] = {"kind": kind, "training": match["training"] or ""}
        if number:
            fields["size" if kind == "rag" else "k"] = int(number)
        if match["option"]:
            field, value = _OPTIONS[match["option"]]
            fields[field] = value
        return cls(**fields)


NO_CONTEXT, FULL_DOCUMENT, ORACLE = Arm("no_context"), Arm("full_document"), Arm("oracle")
