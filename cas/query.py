"""``python -m cas.query --retrieve-k 4 "…"``: retrieve k cartridges, compose them, answer."""

from __future__ import annotations

import sys
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

from cas import console
from cas.errors import CasError, UserError

if TYPE_CHECKING:
    from cas.answering.answerer import Answer, Answerer
    from cas.options import QueryConfig
    from cas.store.store import Store


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, open, answer. Returns the exit status."""

    def run() -> int:
        from cas.options import QueryConfig, parse  # here, so that Ctrl-C ends the imports as it ends the rest

        return query(parse(QueryConfig, "python -m cas.query", arguments))

    return console.run(run)


def query(config: QueryConfig) -> int:
    """Answer one question, or those typed at a prompt."""
    from cas.options import store_folder
    from cas.store.store import Store

    folder = store_folder(config.store)
    with Store.open(folder) as store:
        rows = store.rows().values()
        if not any(row.initialized for row in rows):
            raise UserError(f"{folder} has no cartridges yet; go on with its training")
        if config.question is not None and not config.question.strip():
            raise UserError("the question is empty")
        with console.Display("loading", passing=True):
            answerer, finished = _load(store, config)
        # Where training is finished, these had no conversations, or no steps were asked for.
        if (untrained := sum(row.steps == 0 for row in rows)) and not finished:
            print(
                f"warning: {untrained} of {len(rows)} cartridges are not trained yet; go on with cas.train",
                file=sys.stderr,
            )
        if config.dtype == "auto" and str(answerer.model.dtype) == "torch.float16":
            print("computing in float16: this GPU has no bfloat16; see --dtype", file=sys.stderr)
        if config.question is not None:
            _answer(answerer, config, config.question)
            return 0
        return _prompt(answerer, config)


def _load(store: Store, config: QueryConfig) -> tuple[Answerer, bool]:
    """What answers, and whether the store's training is finished."""
    from cas.answering.answerer import Answerer
    from cas.model.frozen import FrozenModel
    from cas.store.index import load_embedder
    from cas.training.rounds import finished

    model = FrozenModel.from_store(store, config.model, config.revision, config.dtype, config.device)
    answerer = Answerer(model, store, None if config.documents else load_embedder(config.embedder))
    if not config.documents:
        _ = answerer.index  # what is not embedded yet, such as after an interrupted training, is embedded here
    return answerer, finished(store)


def _prompt(answerer: Answerer, config: QueryConfig) -> int:
    """Questions until an empty line (at a terminal) or the end of input; an error in one does not end the others, but the
    exit status is its."""
    interactive, status = sys.stdin.isatty(), 0
    if interactive:
        print("Ask; an empty line ends.", file=sys.stderr)
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or (interactive and not line.strip()):
            return status
        if not line.strip():
            continue
        if not (interactive or config.json):
            print(console.harmless(line.strip()))
        try:
            _answer(answerer, config, line.strip())
        except CasError as error:
            console.complain(str(error))
            status = error.exit_status


def _answer(answerer: Answerer, config: QueryConfig, question: str) -> None:
    chosen = None if config.documents is None else ids_in(config.documents, answerer.store.rows())
    if chosen == []:
        raise UserError("--documents names no document; give ids, comma-separated")
    stream = not config.json

    begun = False

    def write(text: str) -> None:
        nonlocal begun
        text = text if begun else text.lstrip()  # a first token often begins with a space
        begun = begun or bool(text)
        print(console.harmless(text), end="", flush=True)

    answer = answerer.ask(question, config.retrieve_k, chosen, config.max_new_tokens, on_text=write if stream else None)
    if config.json:
        print(console.to_json(answer.to_dict()), flush=True)
    else:
        print(f"\n\n{_summary(answer)}", flush=True)


def ids_in(text: str, known: Container[str]) -> list[str]:
    """The document ids in a comma-separated list; an id may have commas itself, so the longest known ones count."""
    parts, ids = text.split(","), list[str]()
    while parts:
        lengths = range(len(parts), 0, -1)
        length = next((n for n in lengths if ",".join(parts[:n]).strip() in known), 1)
        ids.append(",".join(parts[:length]).strip())
        del parts[:length]
    return [i for i in ids if i]


def _summary(answer: Answer) -> str:
    """The cartridges with score and share of the attention, then tokens, bytes and timings."""
    lines = []
    for c in sorted(answer.cartridges, key=lambda c: -c.attention):
        score = "     " if c.score is None else f"{c.score:5.2f}"
        lines.append(
            f"  {score}  {c.attention:6.1%} of the attention  {console.harmless(c.id)}"
            + (f"  ({console.harmless(c.title)})" if c.title != c.id else "")
        )
    t, s = answer.tokens, answer.timings
    used = f"{t['cartridge']} cartridge positions, {t['prompt']} prompt tokens, {t['answer']} answer tokens"
    took = ", ".join(f"{name} {s[f'{name}_s']:.2f} s" for name in ("retrieve", "load", "prefill", "decode"))
    return "\n".join([*lines, f"  {used}, {answer.bytes / 2**20:.1f} MiB of KV", f"  {took}"])


if __name__ == "__main__":
    sys.exit(main())
