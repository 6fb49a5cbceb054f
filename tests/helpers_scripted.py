"""A model that says what a script tells it, below our decoding: in place of ``FrozenModel.forward`` it reads its own
context through attention, token by token, and returns logits. Whatever decodes, batches or caches, this works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cas.model.frozen import FrozenModel
from cas.model.probe import KVRecorder
from cas.selfstudy.seed_prompts import BRIEF

_SHARP = 200.0  # of attention: all of it goes to one position
_FREQUENCIES = (0.9173, 1.2871, 1.6319, 2.0437, 2.4611, 2.8139)


def script(model: FrozenModel, ask: Callable[[str, str], str], answer: Callable[[str], str], monkeypatch: Any) -> None:
    """Let the model finish a question and answer one as told.

    Args: ask: what follows an opening, given (sentence, opening); answer: to a question.
    """
    monkeypatch.setattr(model, "forward", _Scripted(model, ask, answer))


class _Scripted:
    def __init__(self, model: FrozenModel, ask: Callable[[str, str], str], answer: Callable[[str], str]) -> None:
        self.model, self.ask, self.answer = model, ask, answer
        self.replies: list[list[int]] = []

    def __call__(self, ids: Tensor, positions: Tensor, context: Any, rows: Tensor | int = 0) -> Tensor:
        """A value holds a token, and behind a prompt the number of the reply and of its tokens before this one."""
        if isinstance(rows, int):
            rows = torch.arange(ids.shape[1] - rows if rows else 0, ids.shape[1])
        g = self.model.geometry
        logits = torch.zeros(len(ids), len(rows), g.vocabulary)
        key = self._code(positions, g.kv_heads)
        value = torch.zeros_like(key)
        value[..., 0] = ids[:, None].float()

        def read(back: int, layer: int = 0) -> Tensor:
            query = _SHARP * self._code(positions - back, g.query_heads)
            return context.attend(layer, query, key, value, 1.0, None)[:, rows, 0].round().long()

        if isinstance(context, KVRecorder):
            context.kv = dict.fromkeys(range(g.layers), (key[0], value[0]))
            return logits
        for layer in range(g.layers):
            read(0, layer)
        if ids.shape[1] == 1:
            state = read(1)[..., 1:3] + torch.tensor([0, 1])
        else:
            histories: list[list[int]] = [[] for _ in range(len(ids) * len(rows))]
            for back in range(600):  # read backwards
                for history, token in zip(histories, read(back)[..., 0].flatten().tolist(), strict=True):
                    history.insert(0, token)
                if back % 16 == 15 and all(map(self._is_whole, histories)):
                    break
            numbers = torch.tensor([self._reply(history) for history in histories]).view(len(ids), len(rows))
            state = torch.stack([numbers, torch.zeros_like(numbers)], -1)
        value[:, :, rows, 1:3] = state[:, None].float()
        read(0)
        chosen = torch.tensor([self.replies[number][n] for number, n in state.flatten(0, 1).tolist()])
        return logits.scatter_(2, chosen.view(len(ids), len(rows), 1), 100.0)

    def _code(self, positions: Tensor, heads: int) -> Tensor:
        """[B, heads, T, D]: the product of two codes is greatest where their positions are equal."""
        angles = positions[..., None].double() * torch.tensor(_FREQUENCIES, dtype=torch.double)
        code = torch.cat([angles.cos(), angles.sin()], -1).float()
        assert code.shape[-1] == self.model.geometry.head_dim
        return code[:, None].expand(-1, heads, -1, -1).contiguous()

    def _is_whole(self, history: list[int]) -> bool:
        return "Sentence: " in self._text(history[:-8]) or _find(history, self.model.template.footer_ids) is not None

    def _text(self, ids: Sequence[int]) -> str:
        return self.model.tokenizer.decode(list(ids))

    def _reply(self, history: list[int]) -> int:
        """The number of the reply to a prompt."""
        template, text = self.model.template, self._text(history)
        if "\nAbout " in text:
            sentence, _, rest = text.rpartition("Sentence: ")[2].partition("\nAbout ")
            opening = rest.partition(":\n- ")[2]
            before, continuation = f"\n- {opening}", f"{self.ask(sentence, opening)}\n"
            ids, whole = self.model.encode(before), self.model.encode(before + continuation)
            reply = whole[len(ids) :] if whole[: len(ids)] == ids else self.model.encode(continuation)
        else:
            start = _find(history, template.footer_ids)
            assert start is not None, text
            behind = history[start + len(template.footer_ids) : -len(template.suffix_ids)]
            question = self.model.decode(behind).strip().removesuffix(BRIEF.strip()).strip()
            reply = [*self.model.encode(self.answer(question)), min(template.stop_ids)]
        self.replies.append(reply)
        return len(self.replies) - 1


def _find(items: Sequence[int], part: Sequence[int]) -> int | None:
    """Where a part begins last, or None."""
    places = range(len(items) - len(part), -1, -1)
    return next((i for i in places if list(items[i : i + len(part)]) == list(part)), None)
