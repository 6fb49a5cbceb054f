"""What differs between kinds of model when they question themselves: one :class:`PromptStyle` for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from cas.errors import ConfigError
from cas.model.frozen import FrozenModel
from cas.options import SelfStudy
from cas.selfstudy.conversations import recorded_settings
from cas.selfstudy.list_style import LIST_SEED_PROMPTS, instruction
from cas.selfstudy.seed_prompts import READER_SEED_PROMPTS, SEED_PROMPTS, SeedPrompt

_Settings = TypeVar("_Settings", bound=SelfStudy)

LIST_PARAMETERS = 1_000_000_000
"""Smaller models lose the format and the subject in a list; pointed at one sentence at a time they do not."""

RequestTokens = tuple[Sequence[int], list[tuple[int, ...]]]
"""Tokens that all requests of a call share, directly behind the chunk; then the tokens of each request behind those."""


@dataclass(frozen=True)
class PromptStyle:
    """How a kind of model is asked for questions, and how far what it writes is trusted."""

    seed_prompts: tuple[SeedPrompt, ...]
    """One for each kind of question, with what is appended to the question when it is answered."""
    request_tokens: Callable[[FrozenModel, SeedPrompt, str, Sequence[tuple[str, str]]], RequestTokens] | None
    """Arguments: model, seed prompt, title of the document, (sentence, opening) pairs; one request for each pair. None:
    a call is one request for a list (:mod:`cas.selfstudy.list_writers`)."""
    every_sentence: bool
    """Ask about every sentence in every kind, unless a number of conversations is given; otherwise sample."""
    check_topic: bool
    """Drop questions about what the text does not mention."""
    advice: str
    """What to do when too few questions survive the filters."""
    capital_names: bool = False
    """Drop questions without a name in capitals or a word of the title, and judge answers by English words as they stand;
    otherwise the document's title is put before a question that names no subject."""
    likeliest: bool = False
    """Write the likeliest questions of a kind about a sentence, none twice; otherwise a greedy one and samples."""
    wording_temperature: float = 1.0
    """For sampled further questions about the same sentence."""
    repeat_temperature: float = 0.7
    """For pairs of sentence and opening that were tried before, and for lists."""
    questions_per_call: int = 32
    calls_per_unit: int = 2

    endpoint: bool = False
    """Another model writes the lists."""

    @property
    def lists(self) -> bool:
        """Whether a call asks for a list."""
        return self.request_tokens is None

    def request_length(self, model: FrozenModel, kind: str, settings: SelfStudy, question_tokens: int) -> int:
        """Tokens that a request behind the chunk takes of the model's window, without title and sentence; of a list, with
        questions of half the longest."""
        prompt = self.seed_prompt(kind)
        if self.request_tokens is not None:
            shared, each = self.request_tokens(model, prompt, "", [("", o) for o in prompt.openings])
            return len(shared) + max(map(len, each))
        number = self.sizes(settings)[0]
        request = model.question_tokens(instruction(prompt, "", number))
        return 0 if self.endpoint else len(request) + number * question_tokens // 2

    def sizes(self, settings: SelfStudy) -> tuple[int, int]:
        """Questions per call and calls per unit: those of the settings, else of this style."""
        return settings.questions_per_call or self.questions_per_call, settings.calls_per_unit or self.calls_per_unit

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
    likeliest=True,
)
READER_SAMPLING = replace(READER, likeliest=False)  # stores that an earlier version began

LIST = PromptStyle(
    seed_prompts=LIST_SEED_PROMPTS,
    request_tokens=None,
    every_sentence=False,
    check_topic=True,
    advice="use a larger model, or --writer sentence",
    questions_per_call=20,
    calls_per_unit=8,
)
ENDPOINT = replace(
    LIST, endpoint=True, check_topic=False, advice="see what the endpoint's model writes, or use another one"
)


def prompt_style(model: FrozenModel, settings: SelfStudy | None = None, before: str | None = None) -> PromptStyle:
    """The style that the settings ask for, or else one that suits the model.

    Args: before: "sentence", "likeliest" or "list", how earlier units were written; ``auto`` goes on with it.
    Raises: ConfigError for settings that contradict the model.
    """
    settings = settings or SelfStudy()
    if model.reader:
        if settings.writer_url or settings.writer == "list":
            option = "--writer-url" if settings.writer_url else "--writer list"
            raise ConfigError(f"{option}: the embedded reader answers only questions that it wrote, one a sentence")
        if settings.writer == "none":
            raise ConfigError("--writer none: the embedded reader was never taught to repeat a text; leave it out")
        return READER_SAMPLING if before == "sentence" else READER
    if settings.writer_url:
        return ENDPOINT
    if settings.writer not in ("auto", "none"):  # without a writer, units can still go on as with the automatic one
        return LIST if settings.writer == "list" else INSTRUCT
    return LIST if before == "list" or (before is None and writes_lists(model)) else INSTRUCT


def writes_lists(model: FrozenModel) -> bool:
    """Whether a model can be expected to write twenty good questions in one reply: an instruct model that is no longer
    small."""
    return model.tokenizer.chat_template is not None and _parameters(model) >= LIST_PARAMETERS


def _parameters(model: FrozenModel) -> int:
    return sum(parameter.numel() for parameter in model.hf.parameters())


# Tokens of the longest question and answer, by the parameters that a model has at least. The larger a model, the more
# it says, even when asked for a few words; only answers that do say more take longer.
_LIMITS = ((3_000_000_000, (64, 256)), (1_000_000_000, (64, 160)), (0, (64, 96)))
_READER_LIMITS = (40, 48)


def token_limits(model: FrozenModel, settings: SelfStudy) -> tuple[int, int]:
    """The most tokens of a question and of an answer: those of the settings, else what suits the model."""
    size = _parameters(model)
    limits = _READER_LIMITS if model.reader else next(limits for least, limits in _LIMITS if size >= least)
    return settings.question_tokens or limits[0], settings.answer_tokens or limits[1]


def with_limits(model: FrozenModel, settings: _Settings, conversations: Path) -> _Settings:
    """The settings with limits of questions and answers: as given, else as recorded by the units in the folder
    ``conversations``, else as they suit the model."""
    recorded = recorded_settings(conversations)
    question, answer = token_limits(model, settings)
    return replace(
        settings,
        question_tokens=settings.question_tokens or recorded.get("question_tokens", question),
        answer_tokens=settings.answer_tokens or recorded.get("answer_tokens", answer),
    )
