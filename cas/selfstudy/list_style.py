"""Questions as a list: the request for about twenty of them about a chunk, and the strict reading of the reply.

The five kinds are those of :mod:`cas.selfstudy.seed_prompts`, here about a whole chunk and without examples: an example
would set the language of the questions, and models that can write lists need none.
"""

from __future__ import annotations

import re
from collections import Counter

from cas.selfstudy.seed_prompts import SEED_PROMPTS, SeedPrompt, normal

_REQUESTS = {
    "question": "Write {number} questions about facts in the text above: who, what, when, where, why, how many.",
    "structuring": "Write {number} requests that each ask for one detail of the text above in a fixed form, such as a "
    "name, a date, a number or a short list.",
    "summarisation": "Write {number} requests to sum up, in one sentence, what the text above says about one person, "
    "thing or event.",
    "use case": "Write {number} questions of people who need a fact from the text above for something they do; each "
    "says in a few words what for.",
    "creative": "Write {number} playful questions about facts in the text above, such as quiz questions and riddles.",
}
_RULES = (
    "Each must be answered by the text, and each by another part of it. "
    "Each must name its subject in full{about}, because it will be read without the text. "
    "Do not write answers, and do not ask about the text as a whole. "
    "Write in the language of the text. "
    "Reply with a numbered list, one item a line, each ending with a question mark or a period, and nothing else."
)

LIST_SEED_PROMPTS = tuple(
    SeedPrompt(prompt.kind, _REQUESTS[prompt.kind], (), ("",), prompt.answer_suffix) for prompt in SEED_PROMPTS
)

# "1." "1)" "(1)" "1:" "1、" "1 -" "①" "一、", in the digits of any script, also in bold. "1.5 bar" is no number.
_NUMBER = re.compile(
    r"\**(?:[(（]?\d{1,3}\s?(?:[.．:：)）、।۔](?!\d)|[-–](?=\s))|[\u2460-\u2473]|[一二三四五六七八九十]{1,3}、)"
)
_BULLET = re.compile(r"[-–*•・](?=\s)")
_THOUGHT = re.compile(r"\A(?:.*</think>|\s*<think>.*)", re.DOTALL)  # what a reasoning model considers first, also cut
_LINE_BREAK = re.compile(r"[\r\n\u2028\u2029]")
_QUOTES = ('""', "“”", "„“", "«»", "「」", "『』")


def instruction(prompt: SeedPrompt, title: str, number: int) -> str:
    """The user's message behind the chunk. ``prompt``: one of :data:`LIST_SEED_PROMPTS`; ``number``: of questions."""
    about = f', such as "{title}"' if title else ""
    return f"{prompt.request.format(number=number)} {_RULES.format(about=about)}"


def read_list(reply: str, finished: bool, number: int, asked: str) -> tuple[list[str], Counter[str]]:
    """The questions of a reply, and how many lines were dropped for which reason.

    Only numbered lines count, or lines with a bullet in a reply that numbers none. A reply cut by the token limit loses
    its last line.

    Args: finished: the model ended the reply by itself; number: of questions that were requested, more are dropped;
    asked: the instruction, whose own sentences are dropped.
    """
    dropped = Counter[str]()
    text = _THOUGHT.sub("", reply)
    lines = [line.strip() for line in _LINE_BREAK.split(text)]
    if not finished and lines.pop():  # the text after the last line break
        dropped["unfinished question"] += 1
    lines = [line for line in lines if line]
    marker = _NUMBER if any(map(_NUMBER.match, lines)) else _BULLET
    questions, instruction_words = list[str](), normal(asked)
    for line in lines:
        match = marker.match(line)
        question = _unwrap(line[match.end() :]) if match else ""
        if not normal(question):
            dropped["malformed line"] += 1
        elif normal(question) in instruction_words:
            dropped["copy of the instruction"] += 1
        elif len(questions) == number:
            dropped["more than requested"] += 1
        else:
            questions.append(question)
    if not questions:
        dropped["malformed reply"] += 1
    return questions, dropped


def _unwrap(text: str) -> str:
    """Text without the bold type, code marks or quotation marks around all of it."""
    text = text.strip(" \t\u3000*`")
    first, last = text[:1], text[-1:]
    inside = text[1:-1]
    return inside.strip() if first + last in _QUOTES and first not in inside and last not in inside else text
