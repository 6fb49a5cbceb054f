"""The chat template, cut into the parts that every arm shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cas.errors import ModelError
from cas.model.loading import first_line

_DOCUMENT, _QUESTION, _ANSWER = "\u241eDOCUMENT\u241e", "\u241eQUESTION\u241e", "\u241eANSWER\u241e"


@dataclass(frozen=True)
class Template:
    """The rendered chat template in four parts, each tokenised by itself, the same for every arm:
    header, DOCUMENT, footer, QUESTION, suffix, ANSWER, end."""

    header_ids: tuple[int, ...]
    footer_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    end_ids: tuple[int, ...]  # what the model writes to end its turn
    stop_ids: frozenset[int]


def render_template(tokenizer: Any, system: str, stop_ids: set[int]) -> Template:
    """Render the chat template once with marks for document, question and answer, and cut it there.

    The document stands in the system message; where a template refuses or drops that one, at the start of the user's.
    A tokenizer without a template (a base model) gets plain headings.
    """
    marks = (_DOCUMENT, _QUESTION, _ANSWER)

    def in_order(text: str) -> bool:
        places = [text.find(mark) for mark in marks]
        return all(text.count(mark) == 1 for mark in marks) and places == sorted(places)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

    context = f"{system}\n\n{_DOCUMENT}"
    if tokenizer.chat_template is None:
        bos = tokenizer.bos_token or ""
        text = f"{bos}{context}\n\nQuestion: {_QUESTION}\nAnswer: {_ANSWER}{tokenizer.eos_token or ''}"
    else:
        question = {"role": "user", "content": _QUESTION}
        with_role = [{"role": "system", "content": context}, question]
        without = [{"role": "user", "content": f"{context}\n\n{_QUESTION}"}]
        # Templates that print the date get a fixed one: the header must not change from day to day.
        today = "01 Jan 2026"
        fixed = "{% macro strftime_now(format) %}" + today + "{% endmacro %}" + tokenizer.get_chat_template()
        options = {"chat_template": fixed, "tokenize": False, "enable_thinking": False, "date_string": today}
        for messages in (with_role, without):
            try:
                prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
                text = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": _ANSWER}], **options)
            except Exception as error:  # a template may raise anything; only the last one tried has to work
                if messages is without:
                    raise ModelError(f"the chat template cannot be rendered ({first_line(error)})") from error
                continue
            # The text before the answer is the generation prompt, an empty thinking block included.
            text = prompt + _ANSWER + text.partition(_ANSWER)[2]
            if in_order(text):
                break
    if not in_order(text):
        raise ModelError("the chat template does not show document, question and answer once each, in this order")
    header, rest = text.split(_DOCUMENT)
    footer, rest = rest.split(_QUESTION)
    suffix, end = rest.split(_ANSWER)
    # The turn ends with the template's first special token; plain characters before it do not end answers.
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    end_ids = tuple(i for i in ids(end) if i in stop_ids or i in special)[:1]
    stop_ids = stop_ids | set(end_ids)
    if not stop_ids:
        raise ModelError("the tokenizer names no end-of-turn token; answers could never end")
    return Template(ids(header), ids(footer), ids(suffix), end_ids or (min(stop_ids),), frozenset(stop_ids))
