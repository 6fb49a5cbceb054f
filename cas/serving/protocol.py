"""OpenAI's requests and answers: what of them this server understands, and what it adds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cas.answering.answerer import Answer
from cas.errors import ModelError
from cas.model.chat_template import Turns, render_turns
from cas.model.frozen import FrozenModel
from cas.serving.requests import Finished, Request, RequestError

# Parameters that would change an answer: accepted only with these values, which change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "logprobs": (False, 0), "top_logprobs": (0,), "tools": ([],), "functions": ([],), "modalities": (["text"],),
    "response_format": ({"type": "text"},), "echo": (False,), "suffix": ("",), "audio": (), "prediction": (),
    "web_search_options": (),
}  # fmt: skip


class _Options(BaseModel):
    """What both kinds of requests have. Unknown fields are ignored, as clients send many that change nothing."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    retrieve_k: int | None = None
    cartridges: list[str] | None = None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    @property
    def text(self) -> str:
        """Its text parts together."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(_Options):
    """Of ``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None


class CompletionBody(_Options):
    """Of ``POST /v1/completions``: the prompt is one question, which is asked as in a chat."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]


Body = ChatBody | CompletionBody


def parse_body(kind: type[ChatBody] | type[CompletionBody], raw: bytes) -> Body:
    """A request's JSON. Raises: RequestError that names the first field that is wrong."""
    try:
        body = kind.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise RequestError(400, "invalid_json", "the body is not valid JSON") from None
        # Places inside of unions name Python types; the field and the place in a list say enough.
        place = ".".join(str(part) for part in first["loc"][:3] if isinstance(part, int) or part.isidentifier())
        raise RequestError(400, "invalid_value", f"{place or 'body'}: {first['msg'].lower()}", place) from None
    for name, value in (body.model_extra or {}).items():
        if value is not None and name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise RequestError(400, "unsupported_parameter", f"{name} is not supported with this value", name)
    return body


class Reading:
    """Turns bodies into requests of the engine."""

    def __init__(self, model: FrozenModel, retrieve_k: int, max_new_tokens: int) -> None:
        """``retrieve_k``, ``max_new_tokens``: where a request does not say."""
        self.model, self._retrieve_k, self._max_new_tokens = model, retrieve_k, max_new_tokens
        try:
            self._turns: Turns | None = render_turns(model.text, model.system)
        except ModelError:
            self._turns = None

    def request(self, body: Body) -> Request:
        """Raises: RequestError for conversations that are none."""
        if isinstance(body, ChatBody):
            question, tokens = self._chat(body.messages)
            most = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        else:
            question = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
            tokens, most = self.model.question_tokens(question), body.max_tokens
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        return Request(
            question,
            tokens,
            k=self._retrieve_k if body.retrieve_k is None else body.retrieve_k,
            cartridges=None if body.cartridges is None else tuple(dict.fromkeys(body.cartridges)),
            max_tokens=self._max_new_tokens if most is None else most,
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=secrets.randbits(32) if body.seed is None else body.seed,
            stop=tuple(stop),
        )

    def _chat(self, messages: Sequence[Message]) -> tuple[str, tuple[int, ...]]:
        """The last question, which retrieval searches with, and the tokens of the whole conversation."""
        system = [message.text for message in messages if message.role in ("system", "developer")]
        turns: list[tuple[str, str]] = []
        for message in messages:
            if message.role in ("system", "developer"):
                continue
            role, text = message.role, message.text
            if turns and turns[-1][0] == role:  # as one
                text = f"{turns.pop()[1]}\n\n{text}"
            turns.append((role, text))
        if not turns or turns[0][0] != "user" or turns[-1][0] != "user":
            raise RequestError(400, "invalid_value", "messages: the first and the last are a user's", "messages")
        if len(turns) > 1 and self._turns is None:
            raise RequestError(400, "unsupported_parameter", "messages: this model takes one question", "messages")
        question = turns[-1][1]
        if not question.strip():
            raise RequestError(400, "empty_question", "messages: the question is empty", "messages")
        # The header, which all cartridges were trained behind, has a system text already.
        texts = ["\n\n".join([*system, turns[0][1]]), *(text for _, text in turns[1:])]
        template, tokens = self.model.template, list[int]()
        for number, text in enumerate(texts):
            if number and self._turns is not None:
                tokens += self._turns.answer_ids if number % 2 else self._turns.question_ids
            tokens += self.model.encode(text)
        return question, (*template.footer_ids, *tokens, *template.suffix_ids)


class Writing:
    """The JSON of one answer, whole or in chunks."""

    def __init__(self, body: Body, model: str) -> None:
        self.chat = isinstance(body, ChatBody)
        self.with_usage = body.with_usage
        kind = "chat.completion" if self.chat else "text_completion"
        chunk = "chat.completion.chunk" if self.chat else kind
        self._id = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._common = {"created": int(time.time()), "model": model}
        self._kinds = kind, chunk

    def whole(self, finished: Finished) -> dict[str, Any]:
        """An answer in one piece."""
        text = finished.answer.text
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finished.reason}
        about = {"usage": _usage(finished.answer), "cartridges": _cartridges(finished.answer)}
        return {"id": self._id, "object": self._kinds[0], **self._common, "choices": [choice], **about}

    def first(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})] if self.chat else []

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of the answer's text."""
        return self._chunk({"delta": {"content": text}} if self.chat else {"text": text})

    def last(self, finished: Finished) -> list[dict[str, Any]]:
        """What a stream ends with: why the answer ended, its cartridges, and its numbers of tokens where wanted."""
        end = self._chunk({"delta": {}} if self.chat else {"text": ""}, finished.reason)
        end["cartridges"] = _cartridges(finished.answer)
        if not self.with_usage:
            return [end]
        return [end, {**self._chunk({}), "choices": [], "usage": _usage(finished.answer)}]

    def _chunk(self, content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.with_usage else {}
        return {"id": self._id, "object": self._kinds[1], **self._common, "choices": [choice], **usage}


def _usage(answer: Answer) -> dict[str, Any]:
    """Tokens: a prompt's are the positions of its cartridges, which are cached, and its own. The header, which all
    share, counts nowhere."""
    held, own, said = (answer.tokens[name] for name in ("cartridge", "prompt", "answer"))
    details = {"prompt_tokens_details": {"cached_tokens": held}}
    return {"prompt_tokens": held + own, "completion_tokens": said, "total_tokens": held + own + said, **details}


def _cartridges(answer: Answer) -> list[dict[str, Any]]:
    """Behind the answer, most attended first: retrieval score (null where named) and share of the attention."""
    best_first = sorted(answer.cartridges, key=lambda cartridge: -cartridge.attention)
    return [{"id": c.id, "title": c.title, "score": c.score, "attention": c.attention} for c in best_first]


def error_body(status: int, code: str, message: str, parameter: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}
