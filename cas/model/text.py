"""Text to token ids and back: content never becomes control tokens, and token ids are joined as the text they spell."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from typing import Any

_MARKUP = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
# HTML that some vocabularies hold as tokens of their own: ordinary text, unlike other tokens in brackets.
_HTML = re.compile(
    r"a|abbr|article|aside|b|bbox|blockquote|body|br|button|caption|center|code|col|dd|del|details|div|dl|dt|em|figcaption"
    r"|figure|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|kbd|label|li|link|main|mark|meta|nav|ol"
    r"|option|p|pre|s|samp|script|section|select|small|span|strike|strong|style|sub|summary|sup|table|tbody|td|textarea"
    r"|tfoot|th|thead|title|tr|tt|u|ul|var|video"
)
_INCOMPLETE = "\ufffd"  # what the first bytes of a character decode to
_CONTEXT = 8  # tokens


class TextCodec:
    """Encodes and decodes text with a Hugging Face tokenizer.

    Attributes: special: ids of tokens marked so, such as ``<|im_end|>``. control: those, and others that steer a model,
    such as ``<think>``; other added tokens, such as runs of spaces or HTML tags, are ordinary text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        added = tokenizer.added_tokens_decoder
        self.special = frozenset([*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)])
        template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        self.control = self.special | {i for i, token in added.items() if _steers(token, template)}
        # Some tokenizers put a space in front of every text, and some of those only where there is none.
        self._shows_space = self._decode(self._ids("x")) == " x"
        self._drops_space = self.decode(self._ids(" x")) != " x"

    def encode(self, text: str) -> list[int]:
        """Token ids of content. Control tokens that it names are spelled out as ordinary text."""
        if self._drops_space and text.startswith(" "):
            text = f" {text}"
        ids = self._ids(text)
        return ids if self.control.isdisjoint(ids) else self._spelled(text)

    def encode_template(self, text: str) -> list[int]:
        """Token ids of a part of the chat template, in which control tokens are themselves."""
        return self._ids(text) if text else []

    def decode(self, ids: Sequence[int]) -> str:
        """The text that token ids spell, spaces and control tokens included: ``decode(encode(x)) == x`` up to the
        tokenizer's own normalization."""
        text = self._decode(ids)
        return text.removeprefix(" ") if self._shows_space else text

    def without_special(self, ids: Iterable[int]) -> list[int]:
        """The ids that are no special tokens."""
        return [i for i in ids if i not in self.special]

    def continuation(self, prefix: Sequence[int], ids: Sequence[int]) -> str:
        """The text that ``ids`` add behind ``prefix``, special tokens left out: ``decode(ids)`` alone would lose the space
        in front of a first word in SentencePiece vocabularies."""
        stream = TextStream(self, prefix)
        return "".join([*map(stream.push, ids), stream.finish()])

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: Sequence[int]) -> str:
        if self._backend is not None:
            return str(self._backend.decode(list(ids), skip_special_tokens=False))
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _spelled(self, text: str) -> list[int]:
        if self._plain is None:  # a tokenizer in Python: it knows only how to split special tokens
            return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _plain(self) -> Any:
        """The same tokenizer without control tokens, made when a text first names one."""
        if self._backend is None:
            return None
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json.dumps(_without(json.loads(self._backend.to_str()), self.control)))


class TextStream:
    """The text of an answer while it is decoded, in whole characters: the joined pieces are the answer's text."""

    def __init__(self, codec: TextCodec, prefix: Sequence[int] = ()) -> None:
        """``prefix``: token ids that the answer continues."""
        self._codec, self._ids = codec, codec.without_special(prefix)
        # ids[start:shown] are decoded again as context: a piece alone would lose its space. The context begins between
        # two characters: bytes that begin inside of one would spoil all that follow.
        self._start, self._shown = 0, len(self._ids)
        self._between: list[int] = []  # places between two characters since the start of the context

    def push(self, token: int) -> str:
        """Text that is complete with this token; empty inside a character of several tokens and for special tokens."""
        self._ids += self._codec.without_special([token])
        piece = self._piece()
        if piece.endswith(_INCOMPLETE):
            return ""
        self._shown = len(self._ids)
        self._between.append(self._shown)
        while self._between[0] <= self._shown - _CONTEXT:
            self._start = self._between.pop(0)
        return piece

    def finish(self) -> str:
        """The rest: bytes that never became a character."""
        piece, self._shown = self._piece(), len(self._ids)
        return piece

    def _piece(self) -> str:
        """The text of the tokens that were not shown yet."""
        decode = self._codec._decode if self._start else self._codec.decode
        before, text = decode(self._ids[self._start : self._shown]), decode(self._ids[self._start :])
        pairs = enumerate(zip(before, text, strict=False))
        return text[next((i for i, (a, b) in pairs if a != b), len(before)) :]  # the prefix may end inside a character


def text_until_newline(text: str) -> str:
    """The text up to its first line break. A token such as ``"?\\n"`` ends a line and belongs to it."""
    return re.split(r"[\r\n\u2028\u2029]", text, maxsplit=1)[0]


def _steers(token: Any, template: str) -> bool:
    """Whether an added token that is not marked special is part of a template."""
    content = token.content.strip()
    if _MARKUP.fullmatch(content):
        return not _HTML.fullmatch(content.strip("</>").lower())
    return bool(content) and content in template and not content.replace(" ", "").isalnum()


def _without(spec: Mapping[str, Any], control: AbstractSet[int]) -> dict[str, Any]:
    """A tokenizer's JSON in which no text can spell the tokens ``control``: they have names made of noncharacters."""
    renamed = {t["content"]: f"\ufdd0\ufdd1{t['id']}\ufdd1" for t in spec["added_tokens"] if t["id"] in control}
    model = dict(spec["model"])
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {renamed.get(token, token): i for token, i in vocabulary.items()}
    else:  # Unigram: pairs of piece and score
        model["vocab"] = [[renamed.get(piece, piece), *score] for piece, *score in vocabulary]
    if "merges" in model:
        model["merges"] = [m for m in model["merges"] if renamed.keys().isdisjoint(_merged(m))]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    added = [{**t, "content": renamed.get(t["content"], t["content"])} for t in spec["added_tokens"]]
    return {**spec, "model": model, "added_tokens": added, "post_processor": None}


def _merged(merge: str | Sequence[str]) -> Iterable[str]:
    """The two parts of a BPE merge and what they become."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right
