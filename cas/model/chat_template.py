"""The chat template, cut into the parts that every arm shares."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from cas.errors import ModelError
from cas.model.loading import first_line
from cas.model.text import TextCodec

_TODAY = "01 Jan 2026"  # for templates that print the date: the header must not change from day to day
# <think>, [THINK], <|START_THINKING|>, ◁think▷, <scratchpad>, </think>: tags around a block of thoughts.
_WORDS = "think|thought|reason|analysis|scratchpad|reflection"
_TAG = re.compile(rf"(<\|?|\[|◁)(/?[\w:]*(?:{_WORDS})[\w:]*)(\|?>|\]|▷)", re.IGNORECASE)
_ENDS = {"START": "END", "start": "end", "BEGIN": "END", "begin": "end"}


@dataclass(frozen=True)
class Template:
    """The rendered chat template in four parts, each tokenized by itself, the same for every arm:
    header, DOCUMENT, footer, QUESTION, suffix, ANSWER, end."""

    header_ids: tuple[int, ...]
    footer_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    end_ids: tuple[int, ...]  # what the model writes to end its turn
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class Turns:
    """What stands between the texts of earlier turns: question, ``answer_ids``, ANSWER, ``question_ids``, QUESTION."""

    answer_ids: tuple[int, ...]
    question_ids: tuple[int, ...]


def render_template(codec: TextCodec, system: str, stop_ids: set[int]) -> Template:
    """Render the chat template once with marks for document, question and answer, and cut it there.

    The document stands in the system message; where a template refuses or drops that one, at the start of the user's.
    A tokenizer without a template (a base model) gets plain headings. A block of thoughts that the template opens is
    closed, empty.
    Raises: ModelError for a template that cannot be cut so.
    """
    tokenizer = codec.tokenizer
    marks = _marks(f"{system}{tokenizer.chat_template}")
    document, question, answer = marks
    if tokenizer.chat_template is None:
        text = f"{system}\n\n{document}\n\nQuestion: {question}\nAnswer: {answer}{tokenizer.eos_token or ''}"
        text = (tokenizer.bos_token or "") + text
    else:
        text = _render(tokenizer, system, marks)
    header, rest = text.split(document)
    footer, rest = rest.split(question)
    suffix, end = rest.split(answer)
    # The turn ends with the template's first control token; plain characters before it do not end answers.
    end_ids = tuple(i for i in codec.encode_template(end) if i in stop_ids or i in codec.control)[:1]
    stop_ids = stop_ids | set(end_ids)
    if not stop_ids:
        raise ModelError("the tokenizer names no end-of-turn token; answers could never end")
    header_ids = _header_ids(codec, header, system)
    footer_ids, suffix_ids = (tuple(codec.encode_template(part)) for part in (footer, _closed(suffix, codec)))
    return Template(header_ids, footer_ids, suffix_ids, end_ids or (min(stop_ids),), frozenset(stop_ids))


def render_turns(codec: TextCodec, system: str) -> Turns:
    """Render a conversation of two questions with marks, and cut out what stands between them.

    Raises: ModelError for a template that does not show earlier turns as they were.
    """
    tokenizer = codec.tokenizer
    document, first, answer = _marks(f"{system}{tokenizer.chat_template}")
    second = first.replace("QUESTION", "FOLLOW-UP")
    if tokenizer.chat_template is None:
        text = f"{document}\n\nQuestion: {first}\nAnswer: {answer}\n\nQuestion: {second}"
    else:
        follow_up = [{"role": "assistant", "content": answer}, {"role": "user", "content": second}]
        for messages in _conversations(f"{system}\n\n{document}", first):
            try:
                text = tokenizer.apply_chat_template([*messages, *follow_up], **_options(tokenizer))
            except Exception:  # a template may raise anything
                continue
            places = [text.find(mark) for mark in (first, answer, second)]
            if all(text.count(mark) == 1 for mark in (first, answer, second)) and places == sorted(places):
                break
        else:
            raise ModelError("the chat template does not show earlier turns of a conversation")
    _, rest = text.split(first)
    between, rest = rest.split(answer)
    return Turns(*(tuple(codec.encode_template(part)) for part in (between, rest.split(second)[0])))


def _marks(text: str) -> tuple[str, str, str]:
    """Marks for document, question and answer that do not occur in a text."""
    sign = "\u241e"
    while sign in text:
        sign += "\u241e"
    return f"{sign}DOCUMENT{sign}", f"{sign}QUESTION{sign}", f"{sign}ANSWER{sign}"


def _conversations(context: str, question: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """A first question with the context in the system message, and, for templates without one, in front of it."""
    with_role = [{"role": "system", "content": context}, {"role": "user", "content": question}]
    return with_role, [{"role": "user", "content": f"{context}\n\n{question}"}]


def _options(tokenizer: Any) -> dict[str, Any]:
    """How conversations are rendered: on a fixed day, and without thoughts."""
    fixed = "{% macro strftime_now(format) %}" + _TODAY + "{% endmacro %}" + tokenizer.get_chat_template()
    options = {"chat_template": fixed, "tokenize": False, "date_string": _TODAY}
    return options | {"enable_thinking": False, "thinking": False}


def _render(tokenizer: Any, system: str, marks: tuple[str, str, str]) -> str:
    """A conversation in the chat template, with each mark once and in order."""
    document, question, answer = marks
    options = _options(tokenizer)
    with_role, without = _conversations(f"{system}\n\n{document}", question)
    for messages in (with_role, without):
        try:
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
            text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], **options)
        except Exception as error:  # a template may raise anything; only the last one tried has to work
            if messages is without:
                raise ModelError(f"the chat template cannot be rendered ({first_line(error)})") from error
            continue
        before, _, end = text.partition(answer)
        if (
            "add_generation_prompt" not in options["chat_template"]
            and before.startswith(prompt)
            and before.strip() != prompt.strip()
        ):
            prompt = before
        # The text before the answer is the generation prompt, an empty thinking block included.
        text = prompt + answer + end
        places = [text.find(mark) for mark in marks]
        if all(text.count(mark) == 1 for mark in marks) and places == sorted(places):
            return text
    raise ModelError("the chat template does not show document, question and answer once each, in this order")


def _closed(suffix: str, codec: TextCodec) -> str:
    """The suffix, with the block of thoughts closed that it opens at its end.

    Raises: ModelError for thoughts that are opened in another way: every answer would be one.
    """
    tags = list(_TAG.finditer(suffix))
    last = tags[-1] if tags else None
    if last is None or last[2].startswith("/") or re.match("end", last[2], re.IGNORECASE):
        if not re.search(r"[>|\]](analysis|thought|thinking)\s*(<\|message\|>\s*)?$", suffix):
            return suffix
    elif not suffix[last.end() :].strip():
        left, name, right = last.groups()
        start = next((word for word in _ENDS if name.startswith(word)), None)
        end = f"{left}{_ENDS[start]}{name.removeprefix(start)}{right}" if start else f"{left}/{name}{right}"
        vocabulary = codec.tokenizer.get_vocab()
        if last[0] not in vocabulary or end in vocabulary:
            return f"{suffix[: last.end()]}\n\n{end}\n\n"
    raise ModelError(
        f"the chat template opens a block of thoughts before every answer ({suffix[-40:].strip()!r}), which cannot be "
        "closed; use a model that answers without, or another chat template"
    )


def _header_ids(codec: TextCodec, header: str, system: str) -> tuple[int, ...]:
    """Token ids of the header: control tokens that the system text names are spelled out, and the token that begins
    every text is there once, also where the tokenizer adds it and not the template."""
    ids, system = codec.encode_template(header), system.strip()
    if not codec.control.isdisjoint(codec.encode_template(system)):
        before, _, after = header.partition(system)
        ids = [*codec.encode_template(before), *codec.encode(system), *codec.encode_template(after)]
    first, bos = codec.tokenizer("")["input_ids"][:1], codec.tokenizer.bos_token_id
    return tuple(first + ids if first == [bos] and bos not in ids else ids)
