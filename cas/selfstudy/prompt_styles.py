"""What differs between kinds of model when they question themselves: one :class:`PromptStyle` for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cas.model.frozen import FrozenModel
from cas.options import SelfStudy
from cas.selfstudy.seed_prompts import READER_SEED_PROMPTS, SEED_PROMPTS, SeedPrompt

RequestTokens = tuple[Sequence[int], list[tuple[int, ...]]]
"""Tokens that all requests of a call share, directly behind the chunk; then the tokens of each request behind those."""


@dataclass(frozen=True)
class PromptStyle:
    """How a kind of model is asked for questions, and how far what it writes is trusted."""

    seed_prompts: tuple[SeedPrompt, ...]
    """One for each kind of question, with what is appended to the question when it is answered."""
    request_tokens: Callable[[FrozenModel, SeedPrompt, str, Sequence[tuple[str, str]]], RequestTokens]
    """Arguments: model, seed prompt, title of the document, (sentence, opening) pairs; one request for each pair."""
    every_sentence: bool
    """Ask about every sentence in every kind, unless a number of conversations is given; otherwise sample."""
    check_topic: bool
    """Drop questions about what the text does not mention."""
    advice: str
    """What to do when too few questions survive the filters."""
    capital_names: bool = False
    """Drop questions without a name in capitals or a word of the title, and judge answers by English words as they stand;
    otherwise the document's title is put before a question that names no subject."""
    wording_temperature: float = 1.0
    """For further wordings of a question about the same sentence, beside the greedy one."""
    repeat_temperature: float = 0.7
    """For pairs of sentence and opening that were tried before."""

    def seed_prompt(self, kind: str) -> SeedPrompt:
        """The seed prompt of a kind."""
        return next(prompt for prompt in self.seed_prompts if prompt.kind == kind)


def _instruct_requests(
    model: FrozenModel, seed_prompt: SeedPrompt, title: str, pairs: Sequence[tuple[str, str]]
) -> RequestTokens:
    """An instruction with examples, then a sentence and a list whose next item has begun with the opening."""
    english = any(opening for _, opening in pairs)
    shared = [*model.template.footer_ids, *model.encode(seed_prompt.instruction(english))]
    return shared, [tuple(model.encode(f"\n\nSentence: {s}\nAbout {title}:\n- {opening}")) for s, opening in pairs]


def _reader_requests(
    model: FrozenModel, seed_prompt: SeedPrompt, title: str, pairs: Sequence[tuple[str, str]]
) -> RequestTokens:
    """The format that the reader was trained in: a user message "kind: sentence"."""
    return (), [model.question_tokens(f"{seed_prompt.kind}: {sentence}") for sentence, _ in pairs]


INSTRUCT = PromptStyle(
    seed_prompts=SEED_PROMPTS,
    request_tokens=_instruct_requests,
    every_sentence=False,
    check_topic=True,
    advice="use a larger model",
)
READER = PromptStyle(
    seed_prompts=READER_SEED_PROMPTS,
    request_tokens=_reader_requests,
    every_sentence=True,
    check_topic=False,
    advice="give another --model",
    capital_names=True,
)


def prompt_style(model: FrozenModel) -> PromptStyle:
    """The style that suits a model."""
    return READER if model.reader else INSTRUCT


# Tokens of the longest question and answer, by the parameters that a model has at least. The larger a model, the more
# it says, even when asked for a few words; only answers that do say more take longer.
_LIMITS = ((3_000_000_000, (64, 256)), (1_000_000_000, (64, 160)), (0, (64, 96)))
_READER_LIMITS = (40, 48)


def token_limits(model: FrozenModel, settings: SelfStudy) -> tuple[int, int]:
    """The most tokens of a question and of an answer: those of the settings, else what suits the model."""
    size = sum(parameter.numel() for parameter in model.hf.parameters())
    limits = _READER_LIMITS if model.reader else next(limits for least, limits in _LIMITS if size >= least)
    return settings.question_tokens or limits[0], settings.answer_tokens or limits[1]
