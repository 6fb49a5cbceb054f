"""Scenes packed into one forward, the attention over them, and where that attention is told to look."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cas.data.worlds import SUMMARY, TWO, WHOLE
from experiments.reader_training.scenes import Exchange, Scene, Statement

# What heads of a layer are told to look at: (layer, heads). Naming has a head each for a name's first and last word.
# Finding is done by all heads of two layers: what can be read in many places can be learned by a cartridge in many.
LOOKS = {
    "naming": ((2, (0, 1)),),
    "telling": ((3, (0, 1, 2, 3)),),
    "finding": ((4, (0, 1, 2, 3)), (5, (0, 1, 2, 3))),
    "writing": ((6, (0, 1)),),
    "second": ((6, (2, 3)),),
}
LAYERS = 1 + max(layer for places in LOOKS.values() for layer, _ in places)


@dataclass(frozen=True)
class Look:
    """Tokens of a block that heads are told to look from, and the keys that they may look at: [R], [heads, R, keys], or
    [1, R, keys] for all alike."""

    rows: Tensor
    targets: Tensor


class Packed:
    """Scenes packed one behind the other, and the attention over them.

    A scene is the header, its texts, its exchanges. Texts see the header and themselves; an exchange sees the header,
    the texts it names and itself. Under both layouts, one drawn for each step, every text's keys stand behind the
    header, as those of cartridges do; ``fixed`` and ``offset`` differ in where an exchange's own tokens stand.

    With ``look``, a forward also collects in ``looking`` how far a few heads are from where they should look, which
    :class:`Pointing` says.
    """

    def __init__(self, part: Sequence[Scene], model: Any, random: Random, look: bool = False) -> None:
        template = model.template
        header, h = list(template.header_ids), len(template.header_ids)
        policy, slack = random.choice(("fixed", "offset")), random.randint(0, 64)
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        gold: list[int] = []
        answering: list[bool] = []
        self.header = h
        # Of every scene: its texts' lengths, its exchanges' length, and what these see of it.
        self.scenes: list[tuple[list[int], int, Tensor]] = []
        self.looks: list[tuple[list[Look | None], dict[str, Look]]] = []  # of its texts, of its exchanges
        self.looking: dict[str, list[Tensor]] = {name: [] for name in LOOKS}
        self.kinds: list[tuple[int, str]] = []
        self.answer_lengths: list[int] = []
        for number, scene in enumerate(part):
            start = len(ids)
            texts = [Tokens(model, text) for text in scene.texts]
            owner = [-1] * h  # of every token: the header, a text, an exchange
            ids += header
            positions += range(h)
            begins = []  # of every text, in the scene
            for i, text in enumerate(texts):
                begins.append(len(ids) - start)
                rows += range(len(ids), len(ids) + len(text.ids) - 1)
                gold += text.ids[1:]
                answering += [False] * (len(text.ids) - 1)
                ids += text.ids
                positions += range(h, h + len(text.ids))
                owner += [i] * len(text.ids)
            middle = len(ids)
            pointing = Pointing(texts, begins, scene.statements)
            for i, e in enumerate(scene.exchanges):
                user_tokens, answer_tokens = Tokens(model, e.user), Tokens(model, e.answer)
                user = [*template.footer_ids, *user_tokens.ids, *template.suffix_ids]
                answer = [*answer_tokens.ids, *template.end_ids]
                sizes = [len(texts[t].ids) for t in e.texts]
                first = h + (max(len(text.ids) for text in texts) + slack if policy == "fixed" else sum(sizes))
                rows += range(len(ids) + len(user) - 1, len(ids) + len(user) + len(answer) - 1)
                gold += answer
                answering += [True] * len(answer)
                if look:
                    own = len(ids) - start
                    pointing.exchange(
                        e, user_tokens, answer_tokens, own + len(template.footer_ids), own + len(user) - 1
                    )
                ids += [*user, *answer[:-1]]
                positions += range(first, first + len(user) + len(answer) - 1)
                owner += [len(texts) + i] * (len(user) + len(answer) - 1)
                self.kinds.append((number, e.kind))
                self.answer_lengths.append(len(answer))
            sees = torch.eye(len(texts) + len(scene.exchanges) + 1, dtype=torch.bool)
            sees[:, -1] = True  # the header
            for i, e in enumerate(scene.exchanges):
                sees[len(texts) + i, list(e.texts)] = True
            of = torch.tensor(owner)
            order = torch.arange(len(owner))
            mask = sees[of[middle - start :, None], of[None]] & (order[middle - start :, None] >= order[None])
            self.scenes.append(([len(text.ids) for text in texts], len(ids) - middle, mask))
            if look:
                self.looks.append((pointing.texts(h), pointing.looks(middle - start, len(ids) - start)))
        self.ids, self.positions = torch.tensor([ids]), torch.tensor([positions])
        self.rows, self.gold, self.answering = torch.tensor(rows), torch.tensor(gold), torch.tensor(answering)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query [1, Q, T, D], key and value [1, H, T, D] -> [1, T, Q, D]."""

        def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            # float32: the CPU kernel's backward is three times as fast on short texts as in bfloat16
            with torch.autocast("cpu", enabled=False):
                return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True, **options)

        # Split once: every slice would make autograd fill a whole zero tensor.
        sizes = [n for texts, own, _ in self.scenes for n in (self.header, *texts, own)]
        q, k, v = (iter(x.float().split(sizes, dim=2)) for x in (query, key, value))
        out = []
        here = {name: heads for name, places in LOOKS.items() for at, heads in places if at == layer}
        looks = iter(self.looks if here else ())
        for texts, _, mask in self.scenes:
            in_texts, in_exchanges = next(looks, ([None] * len(texts), {}))
            head = next(q), next(k), next(v)
            keys, values = [head[1]], [head[2]]
            for i in range(len(texts)):
                own = next(q), next(k), next(v)
                queries, known, values_known = (torch.cat(pair, dim=2) for pair in zip(head, own))
                read = attention(queries, known, values_known, is_causal=True)
                out.append(read if i == 0 else read[:, :, self.header :])
                keys.append(own[1])
                values.append(own[2])
                if "naming" in here:
                    self._look("naming", here["naming"], in_texts[i], own[0], known, None, scale)
            own_queries, keys, values = next(q), [*keys, next(k)], [*values, next(v)]
            known = torch.cat(keys, dim=2)
            out.append(attention(own_queries, known, torch.cat(values, dim=2), attn_mask=mask))
            for name, heads in here.items():
                self._look(name, heads, in_exchanges.get(name), own_queries, known, mask, scale)
        return torch.cat(out, dim=2).transpose(1, 2)

    def _look(
        self,
        name: str,
        heads: Sequence[int],
        look: Look | None,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        scale: float,
    ) -> None:
        """Collect -log of the attention that heads give to where they should look: q [1, Q, R, D], k [1, H, S, D]."""
        if look is None:
            return
        with torch.autocast("cpu", enabled=False):
            heads = [head for head in heads if head < q.shape[1]]
            shared = [head * k.shape[1] // q.shape[1] for head in heads]
            scores = (q[0, heads][:, look.rows] @ k[0, shared].transpose(1, 2)) * scale
        if mask is None:  # a text: causal behind the header
            seen = torch.arange(k.shape[2])[None] <= look.rows[:, None] + (k.shape[2] - q.shape[2])
        else:
            seen = mask[look.rows]
        every = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
        self.looking[name].append((every - scores.masked_fill(~look.targets, -torch.inf).logsumexp(-1)).flatten())


class Tokens:
    """A text's tokens and where each begins and ends in it."""

    def __init__(self, model: Any, text: str) -> None:
        encoding = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        self.text, self.ids = text, encoding["input_ids"]
        self.ends = [b for _, b in encoding["offset_mapping"]]

    def of(self, span: tuple[int, int]) -> range:
        """The tokens of a range of characters (a space before belongs to its token)."""
        return range(bisect_left(self.ends, span[0] + 1), bisect_left(self.ends, span[1]) + 1)

    def words(self, subject: str) -> list[range]:
        """The tokens of the first and the last word of a subject's name; none if it is not there."""
        name = subject.removeprefix("the ")
        at, words = self.text.find(name), name.split()
        end = at + len(name)
        return [] if at < 0 else [self.of((at, at + len(words[0]))), self.of((end - len(words[-1]), end))]


class Pointing:
    """Collects where the tokens of a scene's exchanges and texts should look, by index into the scene.

    *Naming*: a value in a text, and the answer to a question, at the subject's name. *Finding*: the answer at the value
    in the texts. *Telling*: a question is to be written about a sentence, and the sentence's value looks at the same
    value in the text. *Writing*: the name that was written there, at itself. *Second*: a second step, when the first
    value says where to look: facts about a founder, the older one of two, people who share something.
    """

    def __init__(self, texts: Sequence[Tokens], begins: Sequence[int], statements: Sequence[Statement]) -> None:
        self._texts, self._begins, self._statements = texts, begins, statements
        self._targets: dict[str, dict[int, tuple[set[int], ...]]] = {name: {} for name in LOOKS}

    def _add(self, name: str, row: int, *targets: set[int]) -> None:
        recorded = self._targets[name].setdefault(row, tuple(set() for _ in targets))
        for targets_so_far, new in zip(recorded, targets, strict=True):
            targets_so_far |= new

    def exchange(self, e: Exchange, user: Tokens, answer: Tokens, question: int, row: int) -> None:
        """``question``: where the user's message begins; ``row``: which predicts the answer's first token."""
        rows = range(row, row + len(answer.ids) + 1)
        if e.kind == "write":
            self._write(e, user, answer, question, row)
        elif e.facts and e.answer in [subject for subject, _ in e.facts]:
            self._compare(e, user, answer, question, row)
        elif e.kind == WHOLE:
            self._count(e, answer, row)
        elif e.facts:
            for word in rows:
                if words := user.words(e.facts[0][0]):
                    self._add("naming", word, *({question + t for t in word_tokens} for word_tokens in words))
            looking, facts = "finding", e.facts
            if e.kind == TWO:
                for word in rows:
                    self._add("finding", word, {t for _, at in self._spots(e, facts[0]) for t in at})
                looking, facts = "second", facts[1:]
            start = 0
            for fact in facts:  # a summary's, one behind the other
                start = answer.text.index(f": {fact[1]}", start) + 2 if e.kind == SUMMARY else 0
                self._copy(
                    looking,
                    row,
                    answer,
                    answer.of((start, start + len(fact[1]))),
                    [at for _, at in self._spots(e, fact)],
                )
                start += len(fact[1])

    def _write(self, e: Exchange, user: Tokens, answer: Tokens, question: int, row: int) -> None:
        for subject, value in e.facts:
            at = user.text.rindex(value)
            value_tokens = [question + t for t in user.of((at, at + len(value)))]
            for spot, stated_at in self._spots(e, (subject, value)):
                for token, target in zip(value_tokens, stated_at):
                    self._add("telling", token, {target})
                for tokens, before in zip(answer.words(subject), self._name(spot), strict=True):
                    for t in tokens:
                        self._add("finding", row + t, set(value_tokens))
                    self._copy("writing", row, answer, tokens, [before])
            for tokens, word in zip(answer.words(subject), user.words(subject)):  # it may also stand in the sentence
                self._copy("writing", row, answer, tokens, [[question + t for t in word]])

    def _compare(self, e: Exchange, user: Tokens, answer: Tokens, question: int, row: int) -> None:
        for fact in e.facts:
            first, last = user.words(fact[0])
            year = {t for _, at in self._spots(e, fact) for t in at}
            for word, whole in ((first, first), (last, last)):
                self._add("naming", question + word[-1], {question + t for t in first}, {question + t for t in whole})
                self._add("finding", question + word[-1], year)
            if fact[0] == e.answer:
                for tokens, word in zip(answer.words(fact[0]), (first, last)):
                    self._copy("second", row, answer, tokens, [[question + t for t in word]])

    def _count(self, e: Exchange, answer: Tokens, row: int) -> None:
        """A count's first token looks at all that is counted; in a list every name looks at its own fact, then at
        itself."""
        for fact in e.facts:
            words = answer.words(fact[0])
            for spot, at in self._spots(e, fact):
                if not words:
                    self._add("finding", row, set(at))
                for tokens, word in zip(words, self._name(spot)):
                    for t in tokens:
                        self._add("finding", row + t, set(at))
                    self._copy("second", row, answer, tokens, [word])

    def _copy(self, name: str, row: int, answer: Tokens, tokens: range, spots: Sequence[Sequence[int]]) -> None:
        """From where tokens of the answer are predicted to the same tokens in the texts."""
        for at in spots:
            for token, target in zip(tokens, at):
                self._add(name, row + token, {target})

    def _spots(self, e: Exchange, fact: tuple[str, str]) -> Iterator[tuple[Statement, list[int]]]:
        """Where the texts of an exchange tell a fact: the tokens of the value."""
        for t in self._statements:
            if t.text in e.texts and (t.subject, t.value) == fact:
                yield t, [self._begins[t.text] + n for n in self._texts[t.text].of(t.at)]

    def _name(self, t: Statement) -> list[list[int]]:
        """The tokens of the first and last word of the name before a fact."""
        return [[self._begins[t.text] + n for n in self._texts[t.text].of(span)] for span in (t.first, t.last)]

    def texts(self, header: int) -> list[Look | None]:
        """From every value in a text to its subject's name before it."""
        targets: list[dict[int, tuple[set[int], ...]]] = [{} for _ in self._texts]
        for t in self._statements:
            text = self._texts[t.text]
            for n in text.of(t.at):
                targets[t.text][header + n] = tuple({header + m for m in text.of(span)} for span in (t.first, t.last))
        return [_look(rows, header, header + len(text.ids)) for rows, text in zip(targets, self._texts)]

    def looks(self, start: int, keys: int) -> dict[str, Look]:
        """Of the exchanges, which begin at ``start``."""
        return {name: look for name, targets in self._targets.items() if (look := _look(targets, start, keys))}


def _look(targets_by_row: dict[int, tuple[set[int], ...]], start: int, keys: int) -> Look | None:
    """As tensors: rows counted from ``start``, targets among ``keys``."""
    targets_by_row = {row: heads for row, heads in targets_by_row.items() if all(heads)}
    if not targets_by_row:
        return None
    targets = torch.zeros(len(next(iter(targets_by_row.values()))), len(targets_by_row), keys, dtype=torch.bool)
    for i, heads in enumerate(targets_by_row.values()):
        for head, wanted in enumerate(heads):
            targets[head, i, list(wanted)] = True
    return Look(torch.tensor(list(targets_by_row)) - start, targets)
