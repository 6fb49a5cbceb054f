"""Training of the embedded reader: what it reads is sound, and an interrupted training goes on."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest
import torch
from torch.nn.functional import cross_entropy

from cas.data.lexicon import EVENT, PERSON, PLACE
from cas.data.worlds import LOOKUP, Shape, make_records, single, whole, world
from cas.model.decoding import Prompt, log_likelihood
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.options import KINDS
from cas.selfstudy.seed_prompts import normal
from experiments.reader_training import train_reader
from experiments.reader_training.packing import LOOKS, Packed, Tokens
from experiments.reader_training.scenes import LEVELS, NOTHING, Exchange, Scene, _statements, scenes
from experiments.reader_training.train_reader import Config, Trainer, make_model


def some(level: int, count: int = 60) -> list[Scene]:
    return list(islice(scenes(7, level), count))


def test_scenes_are_a_function_of_seed_and_number() -> None:
    assert some(3, 12) == some(3, 12) and list(islice(scenes(7, 3, start=5), 4)) == some(3, 12)[5:9]
    assert some(3, 12) != list(islice(scenes(8, 3), 12))


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_answers_stand_in_what_is_seen(level: int) -> None:
    kinds, loaded = set(), set()
    for scene in some(level):
        loaded.add(len(scene.texts))
        assert len(scene.texts) <= LEVELS[level][1]
        for e in scene.exchanges:
            kinds.add(e.kind)
            seen = " ".join(scene.texts[i] for i in e.texts)
            if e.kind in ("lookup", "indirect", "pair", "row", "card", "two documents"):
                assert e.answer in seen, e
            elif e.kind == "summary":
                assert all(value.partition(": ")[2] in seen for value in e.answer.split("; ")) and "; " in e.answer
            elif e.kind == "write":
                asked, (seed, _, sentence) = e.answer, e.user.partition(": ")
                assert sentence in seen and asked[0].isupper() and asked[-1] in "?." and seed in KINDS
                if asked == NOTHING:
                    assert not e.facts
                    continue
                assert seen.count(sentence) == 1 and (seed == "summarisation") == asked.startswith("Sum up")
    wanted = {"lookup", "write", "two documents", "summary"} if level else {"pair", "row", "card"}
    assert wanted <= kinds and {1, 2} <= loaded


def test_what_a_text_tells_stands_behind_the_name_of_its_subject() -> None:
    told = [
        (scene.texts[t.text], t) for level in range(len(LEVELS)) for scene in some(level, 15) for t in scene.statements
    ]
    assert len(told) > 500
    for text, t in told:
        words = t.subject.removeprefix("the ").split()
        assert text[slice(*t.at)] == t.value and text[slice(*t.last)] == words[-1]
        assert text[slice(*t.first)] in (words[0], words[-1]) and max(t.first[1], t.last[1]) < t.at[0]
        assert words[-1] not in text[t.last[1] : t.at[0]] and "\n\n" not in text[t.last[0] : t.at[1]]
    # Nothing is left out: every question about one fact finds where its answer is told.
    for scene in some(len(LEVELS) - 1):
        for e in scene.exchanges:
            if e.kind in ("lookup", "indirect"):
                assert any(((t.subject, t.value),) == e.facts and t.text in e.texts for t in scene.statements), e


def test_heads_are_shown_names_facts_and_answers() -> None:
    model = FrozenModel.from_pretrained("reader")  # whose words are the same tokens wherever they stand
    template = model.template
    part = [*some(1, 12), *some(4, 24)]
    packed = Packed(part, model, Random(0), look=True)
    ids, start = packed.ids[0].tolist(), 0
    gold = dict(zip(packed.rows.tolist(), packed.gold.tolist()))

    def spelt(at: list[int]) -> str:
        return model.decode([ids[i] for i in at]).replace(" ", "")

    shown: Counter[str] = Counter()
    for scene, (sizes, own, mask), (reading, looks) in zip(part, packed.scenes, packed.looks):
        names = {w for t in scene.statements for w in t.subject.split()}
        for number, look in enumerate(reading):
            begin = start + packed.header + sum(sizes[:number])
            for i, row in enumerate(look.rows.tolist() if look else ()):
                for head in look.targets[:, i]:
                    at = [t if t < packed.header else t - packed.header for t in head.nonzero().flatten().tolist()]
                    assert spelt([begin + t for t in at]) in names and max(at) < row
                    shown["reading"] += 1
        middle = start + packed.header + sum(sizes)
        of: list[Exchange] = []  # of every token of the exchanges
        for e in scene.exchanges:
            tokens = [*template.footer_ids, *model.encode(e.user), *template.suffix_ids, *model.encode(e.answer)]
            of += [e] * len(tokens)
        assert len(of) == own
        for name, look in looks.items():
            for i, row in enumerate(look.rows.tolist()):
                e = of[row]
                values = {t for _, v in e.facts for t in model.encode(v)}
                for head in look.targets[:, i]:
                    assert mask[row, head].all(), "they look at what they may see"
                    at = [start + t for t in head.nonzero().flatten().tolist()]
                    found = {ids[t] for t in at}
                    shown[f"{name} {e.kind}"] += 1
                    if name == "naming":
                        assert spelt(at) in {w for subject, _ in e.facts for w in subject.split()}
                    elif name == "telling":
                        assert found == {ids[middle + row]} and max(at) < middle
                    elif name == "finding":
                        assert found <= values
                        if e.kind in ("lookup", "indirect", "row", "summary"):
                            assert found == {gold[middle + row]}
                    else:
                        assert found == {gold[middle + row]}
                        compared = name == "second" and e.answer in dict(e.facts)
                        assert (min(at) >= middle) if compared else name == "writing" or max(at) < middle
        start = middle + own
    for what in ("reading", "finding lookup", "finding card", "finding summary", "telling write", "writing write"):
        assert shown[what] > 30, shown
    assert shown["second two documents"] > 10 and shown["second whole document"] > 10


def test_looking_is_the_attention_of_the_model(tiny: Callable[..., FrozenModel]) -> None:
    """What is collected is -log of the attention weight, as the model's own eager attention has it."""
    model = tiny("llama")
    record = next(make_records("reader/x", 0, LEVELS[1][0], 1))
    text = record.document.text
    told = next(_statements([record], [text]))
    packed = Packed([Scene((text,), (), (told,))], model, Random(0), look=True)
    model.forward(packed.ids, packed.positions, packed, rows=torch.tensor([0]))
    hf = copy.deepcopy(model.hf)
    hf.set_attn_implementation("eager")
    weights = hf(packed.ids, output_attentions=True).attentions[LOOKS["naming"][0][0]][0]
    tokens = Tokens(model, text)
    expected = [
        -weights[head, packed.header + row, [packed.header + n for n in tokens.of(span)]].sum().log()
        for head, span in enumerate((told.first, told.last))
        for row in tokens.of(told.at)
    ]
    torch.testing.assert_close(torch.cat(packed.looking["naming"]), torch.stack(expected))


def test_questions_are_written_in_training_words_only() -> None:
    tested = [w for a in (*PERSON, *PLACE, *EVENT) for w in a.tests]
    for record in make_records("reader/x", 0, Shape(), 2):
        for asked in (*single(record), *whole(record, Random(0))):
            assert not set(map(normal, asked.asks)) & set(map(normal, asked.tests))
    starts = {normal(w.split("{s}")[0]) for w in tested} - {""}
    trained = {normal(w.split("{s}")[0]) for a in (*PERSON, *PLACE, *EVENT) for w in a.asks}
    assert not starts & trained
    for scene in some(5):
        for e in scene.exchanges:
            if e.kind == "write":
                assert not any(normal(e.answer).startswith(f"{s} ") for s in starts), e


def test_weights_begin_as_looking_up() -> None:
    """On random tokens told twice: the first layer sees one, two, three tokens back, the second the earlier telling."""
    tokenizer = train_reader.make_tokenizer(500, 40)
    hf = make_model(Config(), tokenizer).eval()
    hf.set_attn_implementation("eager")
    once = torch.randint(4, 500, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second, *_ = hf(torch.cat([once, once], dim=1), output_attentions=True).attentions
    rows = torch.arange(60 + 3, 120)
    for head in range(3):
        assert first[0, head, rows, rows - head - 1].min() > 0.8
    for head in range(4):
        assert (
            second[0, head, rows, rows - 60 + (head % 2 == 0)].mean() > 0.2
        )  # a share of one in sixty, were it chance


@pytest.mark.parametrize("looking", [0.0, 0.5])  # with it, only the heads that look at names have begun
def test_training_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looking: float) -> None:
    make = train_reader.make_tokenizer
    monkeypatch.setattr(train_reader, "make_tokenizer", lambda vocabulary: make(vocabulary, 40))

    def trainer(name: str) -> Trainer:
        return Trainer(
            Config(
                output=str(tmp_path / name),
                vocabulary=500,
                hidden=32,
                layers=5 if looking else 2,
                looking=looking,
                heads=2,
                intermediate=48,
                lr=1e-2,
                warmup=5,
            )
        )

    def steps(one: Trainer, first: int, count: int) -> list[float]:
        return [one.train_step(some(0, 40)[4 * i : 4 * i + 4])["loss"] for i in range(first, first + count)]

    whole_run, cut = trainer("whole"), trainer("cut")
    losses = steps(whole_run, 0, 8)
    assert steps(cut, 0, 4) == losses[:4] and (looking or losses[-1] < losses[0])
    cut.save()
    resumed = trainer("cut")
    assert (resumed.step, resumed.tokens) == (cut.step, cut.tokens) and steps(resumed, 4, 4) == losses[4:]
    for name, parameter in whole_run.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name])

    model = FrozenModel.from_pretrained(str(tmp_path / "cut" / "model"), device="cpu")
    assert model.template.header_ids and model.hf.dtype in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("policy", ["fixed", "offset"])
def test_scenes_are_read_as_the_engine_reads_cartridges(
    tiny: Callable[..., FrozenModel], policy: Literal["fixed", "offset"]
) -> None:
    """The same likelihoods as from separately prefilled texts, composed and decoded by the engine that users have."""

    class Drawn(Random):
        def choice(self, seq: Any) -> Any:
            return policy

        def randint(self, a: int, b: int) -> int:
            return 7

    model = tiny("llama")
    part = [s for s in some(3, 12) if s.exchanges][:6]
    packed = Packed(part, model, Drawn())
    logits = model.forward(packed.ids, packed.positions, packed, rows=packed.rows)[0].float()
    losses = cross_entropy(logits, packed.gold, reduction="none")
    found = [float(part.mean()) for part in losses[packed.answering].split(packed.answer_lengths)]
    reading = losses[~packed.answering]
    expected, read, h = [], [], model.layout_header
    for scene in part:
        tokens = [[*model.template.header_ids, *model.encode(text)] for text in scene.texts]
        kv = {f"{i}": model.prefill(t)[:, :, :, h:] for i, t in enumerate(tokens)}
        layout = Layout(policy, h, max(t.shape[3] for t in kv.values()) + 7)
        prompts = [Prompt(model.question_tokens(e.user), tuple(f"{i}" for i in e.texts)) for e in scene.exchanges]
        gold = [[*model.encode(e.answer), *model.template.end_ids] for e in scene.exchanges]
        expected += [-x for x in log_likelihood(model, prompts, gold, kv, layout)]
        for ids in tokens:
            own = model.hf(torch.tensor([ids])).logits[0].float()[h:-1]
            read += cross_entropy(own, torch.tensor(ids[h + 1 :]), reduction="none").tolist()
    assert max(len(s.texts) for s in part) > 1 and max(len(e.texts) for s in part for e in s.exchanges) > 1
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reading, torch.tensor(read), atol=1e-4, rtol=1e-4)


def test_every_arm_holds_the_answer_and_its_size(tiny: Callable[..., FrozenModel]) -> None:
    from experiments.reader_training import reader

    model, collection = tiny("llama"), world(5, 16)
    lookups = [q for q in collection.questions if q.kind == LOOKUP]
    contexts = [context for context, _ in reader.contexts(lookups, [])]
    assert [*map(str, contexts[:4])] == ["no_context", "chunk512", "whole_document", "rag_shaped"]
    assert len(contexts) == 4 + 3 * 3
    for question in lookups[::9]:
        for context in contexts:
            texts, policy = reader.context_texts(model, collection, context, question)
            assert any(question.answers[0] in text for text in texts) == (context.kind != "no_context")
            if context.kind == "documents":
                count, _, way = str(context).removeprefix("documents").partition("_")
                assert len(texts) == (1 if way == "text" else int(count)) and policy == ("offset" if way else "fixed")
                assert "\n\n".join(texts).count(" was founded by ") <= int(count)
            elif context.kind == "rag_shaped":
                titles = {d.title for d in collection.documents}
                assert sum(title in texts[0] for title in titles) >= 6
            elif context.kind == "chunk512":
                assert len(model.encode(texts[0])) <= 512 or texts[0].count("\n\n") <= 1
