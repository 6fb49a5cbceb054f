"""Scenes packed into one forward, the attention over them, and where that attention is told to look."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from experiments.reader_scenes import Exchange, Scene, Told

NAMING, FINDING = 2, 4  # layers of the heads that are told to look at names, and at answers
HEADS = 2  # of each: at a name's first and last word; at the answer


@dataclass(frozen=True)
class Look:
    """Tokens of a block that heads are told to look from, and the keys that they may look at: [R], [heads, R, keys]."""

    rows: Tensor
    targets: Tensor


class Packed:
    """Scenes packed one behind the other, and the attention over them.

    A scene is the header, its texts, its exchanges. Texts see the header and themselves; an exchange sees the header, the
    texts it names and itself. Under both layouts, one drawn for each step, every text's keys stand behind the header, as
    those of cartridges do; ``fixed`` and ``offset`` differ in where an exchange's own tokens stand.

    With ``look``, a forward also collects in ``looking`` how far a few heads are from where they should look: from a value in
    a text and from the answer to a question, to the subject's name; from the answer, to the value in the texts.
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
        self.looks: list[tuple[list[Look | None], Look | None, Look | None]] = []
        self.looking: dict[int, list[Tensor]] = {NAMING: [], FINDING: []}
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
            naming, finding = Looking(), Looking()
            for i, e in enumerate(scene.exchanges):
                asked, told = Tokens(model, e.user), Tokens(model, e.answer)
                user = [*template.footer_ids, *asked.ids, *template.suffix_ids]
                answer = [*told.ids, *template.end_ids]
                sizes = [len(texts[t].ids) for t in e.texts]
                first = h + (max(len(text.ids) for text in texts) + slack if policy == "fixed" else sum(sizes))
                rows += range(len(ids) + len(user) - 1, len(ids) + len(user) + len(answer) - 1)
                gold += answer
                answering += [True] * len(answer)
                if look and e.subject:
                    own = len(ids) - start
                    naming.question(e, asked, own + len(template.footer_ids), own + len(user) - 1, len(answer))
                    finding.answer(e, told, texts, begins, scene.told, own + len(user) - 1)
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
                reading = [Looking() for _ in texts]
                for t in scene.told:
                    reading[t.text].value(t, texts[t.text], h)
                self.looks.append(
                    (
                        [r.look(h, h + len(text.ids)) for r, text in zip(reading, texts)],
                        naming.look(middle - start, len(ids) - start),
                        finding.look(middle - start, len(ids) - start),
                    )
                )
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
        looks = iter(self.looks if layer in self.looking else ())
        for texts, _, mask in self.scenes:
            in_texts, naming, finding = next(looks, ([None] * len(texts), None, None))
            head = next(q), next(k), next(v)
            keys, values = [head[1]], [head[2]]
            for i in range(len(texts)):
                own = next(q), next(k), next(v)
                asking, known, values_known = (torch.cat(pair, dim=2) for pair in zip(head, own))
                read = attention(asking, known, values_known, is_causal=True)
                out.append(read if i == 0 else read[:, :, self.header :])
                keys.append(own[1])
                values.append(own[2])
                if layer == NAMING:
                    self._look(layer, in_texts[i], own[0], known, None, scale)
            asked, keys, values = next(q), [*keys, next(k)], [*values, next(v)]
            known = torch.cat(keys, dim=2)
            out.append(attention(asked, known, torch.cat(values, dim=2), attn_mask=mask))
            self._look(layer, naming if layer == NAMING else finding, asked, known, mask, scale)
        return torch.cat(out, dim=2).transpose(1, 2)

    def _look(self, layer: int, look: Look | None, q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> None:
        """Collect -log of the attention that the first heads give to where they should look: q [1, Q, R, D], k [1, H, S, D]."""
        if look is None:
            return
        with torch.autocast("cpu", enabled=False):
            shared = [head * k.shape[1] // q.shape[1] for head in range(HEADS)]
            scores = (q[0, :HEADS, look.rows] @ k[0, shared].transpose(1, 2)) * scale
        if mask is None:  # a text: causal behind the header
            seen = torch.arange(k.shape[2])[None] <= look.rows[:, None] + (k.shape[2] - q.shape[2])
        else:
            seen = mask[look.rows]
        every = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
        self.looking[layer].append((every - scores.masked_fill(~look.targets, -torch.inf).logsumexp(-1)).flatten())


class Tokens:
    """A text's tokens and where each begins and ends in it."""

    def __init__(self, model: Any, text: str) -> None:
        found = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        self.text, self.ids = text, found["input_ids"]
        self.ends = [b for _, b in found["offset_mapping"]]

    def of(self, span: tuple[int, int]) -> range:
        """The tokens of a range of characters (a space before belongs to its token)."""
        return range(bisect_left(self.ends, span[0] + 1), bisect_left(self.ends, span[1]) + 1)

    def words(self, subject: str) -> list[range]:
        """The tokens of the first and the last word of a subject's name; none if it is not there."""
        words = subject.removeprefix("the ").split()
        at = [self.text.find(word) for word in (words[0], words[-1])]
        return [] if min(at) < 0 else [self.of((a, a + len(w))) for a, w in zip(at, (words[0], words[-1]))]


class Looking:
    """Collects where tokens of a block should look, by index into the scene (or a text with the header before it)."""

    def __init__(self) -> None:
        self.found: dict[int, list[set[int]]] = {}

    def add(self, row: int, *targets: set[int]) -> None:
        for mine, new in zip(self.found.setdefault(row, [set() for _ in range(HEADS)]), targets, strict=True):
            mine |= new

    def question(self, e: Exchange, asked: Tokens, begin: int, first_row: int, rows: int) -> None:
        """From every token of an answer to the subject's name in the question."""
        if words := asked.words(e.subject):
            for row in range(first_row, first_row + rows):
                self.add(row, *({begin + t for t in word} for word in words))

    def answer(
        self, e: Exchange, told: Tokens, texts: Sequence[Tokens], begins: Sequence[int], facts: Sequence[Told], row: int
    ) -> None:
        """From where a token of the answer is predicted to that token in the texts: of a value, or of a name to write."""
        names = told.words(e.subject) if e.kind == "write" else []
        for fact in facts:
            if fact.text not in e.texts or fact.subject != e.subject:
                continue
            begin, text = begins[fact.text], texts[fact.text]
            if names:
                pairs = [*zip(names[0], text.of(fact.first)), *zip(names[1], text.of(fact.last))]
            elif fact.value == e.answer:
                pairs = list(enumerate(text.of(fact.at)))
            else:
                continue
            for n, token in pairs:
                if told.ids[n] == text.ids[token]:
                    self.add(row + n, {begin + token}, {begin + token})

    def value(self, t: Told, text: Tokens, header: int) -> None:
        """From a value in a text to its subject's name before it."""
        for row in text.of(t.at):
            self.add(header + row, *({header + n for n in text.of(span)} for span in (t.first, t.last)))

    def look(self, start: int, keys: int) -> Look | None:
        """As tensors: rows counted from ``start``, targets among ``keys``."""
        if not self.found:
            return None
        targets = torch.zeros(HEADS, len(self.found), keys, dtype=torch.bool)
        for i, heads in enumerate(self.found.values()):
            for head, wanted in enumerate(heads):
                targets[head, i, list(wanted)] = True
        return Look(torch.tensor(list(self.found)) - start, targets)
