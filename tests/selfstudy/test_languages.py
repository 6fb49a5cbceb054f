"""Perfect questions and answers are kept, whatever the language and the tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, TEXTS, tiny_hf, tiny_tokenizer
from helpers_scripted import script
from helpers_tokenizers import OWN, own_tokenizer

from cas.data.collection import Collection, Document
from cas.model.frozen import FrozenModel, Source
from cas.options import DEFAULT_SYSTEM
from cas.selfstudy.conversations import Conversations
from cas.selfstudy.seed_prompts import bad_answer, bad_question, is_english, units, words
from cas.selfstudy.subjects import Subjects
from cas.selfstudy.synthesize import synthesize
from cas.store.store import Store

# Title, sentences, and for each sentence two questions with answers; the last two lines: off topic, and an answer without substance.
LANGUAGES: dict[str, tuple[str, dict[str, tuple[tuple[str, str], ...]], str, str]] = {
    "German": (
        "Die Marrow-Brücke",
        {
            "Die Brücke wurde 1902 eröffnet und hat sieben Bögen.": (
                ("Wann wurde die Brücke eröffnet?", "Im Jahr 1902."),
                ("Wie viele Bögen hat die Brücke?", "Sieben."),
            ),
            "Ihre Geländer wurden von einem Schmied aus Alteburg geschmiedet.": (
                ("Wer hat die Geländer geschmiedet?", "Ein Schmied aus Alteburg."),
                ("Woher stammte der Schmied der Geländer?", "Aus Alteburg."),
            ),
        },
        "Wie heißt die Hauptstadt von Frankreich?",
        "Die Brücke.",
    ),
    "Russian": (
        "Старая мельница",
        {
            "Мельницу построил инженер Павел Громов в 1887 году.": (
                ("Кто построил мельницу?", "Павел Громов."),
                ("В каком году была построена мельница?", "В 1887 году."),
            ),
            "Каждую осень здесь мололи двадцать тонн зерна.": (
                ("Сколько тонн зерна мололи здесь осенью?", "Двадцать тонн."),
                ("Что мололи на мельнице каждую осень?", "Зерно."),
            ),
        },
        "Какой город является столицей Франции?",
        "Мельница.",
    ),
    "Chinese": (
        "红石水库",
        {
            "红石水库由工程师林安设计，于1958年建成。": (
                ("红石水库是谁设计的？", "工程师林安。"),
                ("红石水库是哪一年建成的？", "1958年。"),
            ),
            "水库的闸门每天早上六点打开，由两名值班员看守。": (
                ("水库的闸门几点打开？", "早上六点。"),
                ("水库的闸门由谁看守？", "两名值班员。"),
            ),
        },
        "法国的首都是哪里？",
        "水库。",
    ),
    "Japanese": (
        "潮見灯台",
        {
            "潮見灯台は1931年に漁師たちが建てた。": (
                ("潮見灯台はいつ建てられましたか？", "1931年です。"),
                ("潮見灯台を建てたのは誰ですか？", "漁師たちです。"),
            ),
            "灯台の光は緑色で、二十キロ先から見える。": (
                ("灯台の光は何色ですか？", "緑色です。"),
                ("灯台の光はどこから見えますか。", "二十キロ先からです。"),
            ),
        },
        "フランスの首都はどこですか？",
        "灯台。",
    ),
    "Arabic": (
        "مكتبة الوادي",
        {
            "افتتحت مكتبة الوادي عام 1964 على يد المعلمة سلمى حداد.": (
                ("متى افتتحت مكتبة الوادي؟", "عام 1964."),
                ("من افتتح مكتبة الوادي؟", "المعلمة سلمى حداد."),
            ),
            "تضم المكتبة تسعة آلاف كتاب وتغلق أبوابها يوم الجمعة.": (
                ("كم كتابا تضم المكتبة؟", "تسعة آلاف كتاب."),
                ("متى تغلق المكتبة أبوابها؟", "يوم الجمعة."),
            ),
        },
        "ما هي عاصمة فرنسا؟",
        "المكتبة.",
    ),
    "Hindi": (
        "नीलम बाँध",
        {
            "नीलम बाँध 1975 में इंजीनियर रवि शर्मा ने बनाया था।": (
                ("नीलम बाँध किसने बनाया था?", "इंजीनियर रवि शर्मा ने।"),
                ("नीलम बाँध कब बनाया गया था?", "1975 में।"),
            ),
            "बाँध के सात फाटक हर सुबह खोले जाते हैं।": (
                ("बाँध के कितने फाटक हैं?", "सात।"),
                ("बाँध के फाटक कब खोले जाते हैं?", "हर सुबह।"),
            ),
        },
        "फ्रांस की राजधानी क्या है?",
        "बाँध।",
    ),
    "Korean": (
        "솔바람 다리",
        {
            "솔바람 다리는 1983년에 건축가 한지우가 설계했다.": (
                ("솔바람 다리는 누가 설계했나요?", "건축가 한지우입니다."),
                ("솔바람 다리는 언제 설계되었나요?", "1983년입니다."),
            ),
            "다리의 등불은 밤마다 파란색으로 켜진다.": (
                ("다리의 등불은 무슨 색으로 켜지나요?", "파란색입니다."),
                ("다리의 등불은 언제 켜지나요?", "밤마다."),
            ),
        },
        "프랑스의 수도는 어디입니까?",
        "다리.",
    ),
    "Thai": (
        "สะพานจันทร์เพ็ญ",
        {
            "สะพานจันทร์เพ็ญออกแบบโดยวิศวกรสมชายและเปิดใช้ในปี 1978": (
                ("ใครออกแบบสะพานจันทร์เพ็ญ", "วิศวกรสมชาย"),
                ("สะพานจันทร์เพ็ญเปิดใช้ในปีใด?", "ปี 1978"),
            ),
        },
        "เมืองหลวงของฝรั่งเศสคืออะไร?",
        "สะพาน",
    ),
}
ENGLISH = {
    "English": (
        "Marrow Mill",
        "The mill was built by Ines Calloway in 1902. Its seven wheels grind twenty tonnes of rye each autumn. A brass bell "
        "hangs above the eastern door and rings at noon.",
    ),
    "lower-case English": (
        "tidepool cache",
        "the cache lives in ~/.cache/tidepool unless TIDEPOOL_CACHE names another folder. when it is full, the tile that was "
        "read longest ago is removed first. set max_bytes to 0 and nothing is stored at all.",
    ),
}


def sentence_piece() -> Any:
    """A tokenizer whose words begin with a space that decoding drops at the start of a text; other characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=128, special_tokens=["<s>", "<|im_start|>", "<|im_end|>"], show_progress=False
    )
    bpe.train_from_iterator([*TEXTS.values(), *[DEFAULT_SYSTEM] * 3], trainer)
    saved = json.loads(bpe.to_str())
    vocabulary = saved["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    saved["model"] |= {"byte_fallback": True, "unk_token": "<0x00>"}
    bpe = Tokenizer.from_str(json.dumps(saved))
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<s>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def question_mark_and_line_break() -> Any:
    """A tokenizer in which "?" and a line break, and a full stop and a line break, are one token each."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(tiny_tokenizer().backend_tokenizer).from_str(tiny_tokenizer().backend_tokenizer.to_str()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("?\n", ".\n", "？\n")])
    tokenizer.chat_template = CHATML
    return tokenizer


def from_folder(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(os.environ["CAS_TOKENIZERS"]) / name)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-level": tiny_tokenizer,
    "question mark and line break": question_mark_and_line_break,
    "SentencePiece": sentence_piece,
    **{f"small {name}": partial(own_tokenizer, name) for name in OWN},
    **{name: (lambda name=name: from_folder(name)) for name in ("qwen3", "llama3_1", "gemma3", "llama2")},  # type: ignore[misc]
}


@cache
def scripted_model(name: str) -> FrozenModel:
    tokenizer = TOKENIZERS[name]()
    hf = tiny_hf("llama", vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id)
    return FrozenModel(hf, tokenizer, Source("folder", f"scripted-{name}"))


REAL = ("qwen3", "llama3_1", "gemma3", "llama2")
QUICK = ("German", "Chinese")  # with every tokenizer; other pairs only in slow runs


def pairs(languages: Iterable[str]) -> list[Any]:
    """Tokenizers with languages."""
    needs = pytest.mark.skipif("CAS_TOKENIZERS" not in os.environ, reason="needs CAS_TOKENIZERS")
    return [
        pytest.param(
            tokenizer,
            language,
            id=f"{tokenizer}-{language}",
            marks=[
                *([needs] if tokenizer in REAL else []),
                *([] if tokenizer == "byte-level" or language in QUICK else [pytest.mark.slow]),
            ],
        )
        for tokenizer in TOKENIZERS
        for language in languages
    ]


def study(
    model: FrozenModel, language: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> tuple[Conversations, Callable[[str], str]]:
    """The conversations that a scripted writer has about the document ``one``, and its answer to a question."""
    title, sentences, _, _ = LANGUAGES[language]
    answers = {question: answer for pairs in sentences.values() for question, answer in pairs}
    left = {sentence: [question for question, _ in pairs] for sentence, pairs in sentences.items()}

    def ask(sentence: str, opening: str) -> str:
        assert opening == ""  # the sentence is not in English
        left[sentence].append(left[sentence].pop(0))
        return left[sentence][-1]

    def answer(question: str) -> str:
        return answers[question.removeprefix(f"{title}: ")]

    script(model, ask, answer, monkeypatch)
    monkeypatch.setattr("cas.selfstudy.planners.MAX_QUESTIONS_PER_SENTENCE", 1)
    conversations = synthesize(
        model,
        Collection("one", (Document("one", title, " ".join(sentences)),)),
        store,
        reconstruction="off",
        kinds=("question", "creative"),
        conversations=len(answers),
        questions_per_call=len(sentences),
        top_k=5,
        question_tokens=250,  # these tokenizers spell most scripts in bytes
        answer_tokens=250,
    )
    return conversations, answer


@pytest.mark.parametrize(("tokenizer", "language"), pairs(LANGUAGES))
def test_perfect_conversations_are_kept(
    tokenizer: str, language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every one of a few; the title is put before those that name nothing of the text."""
    model = scripted_model(tokenizer)
    title, sentences, _, _ = LANGUAGES[language]
    with Store.create(tmp_path / "store", model, tokens=16) as store:
        conversations, answer = study(model, language, store, monkeypatch)
    assert not conversations.dropped
    kept = conversations.by_document["one"]
    asked = {question for pairs in sentences.values() for question, _ in pairs}
    assert {c.question.removeprefix(f"{title}: ") for c in kept} == asked
    for c in kept:
        assert model.decode(model.text.without_special(c.answer.tolist())) == answer(c.question)


@pytest.mark.parametrize(("tokenizer", "language"), pairs(ENGLISH))
def test_perfect_conversations_in_english_are_kept(
    tokenizer: str, language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all openings at least 95 of 100."""
    model = scripted_model(tokenizer)
    title, text = ENGLISH[language]

    def ask(sentence: str, opening: str) -> str:
        first, second = [w for w in words(sentence) if len(w) > 3 and not is_stop(w)][-2:]
        return f" concerning the {first} and the {second} of {title}?"

    def answer(question: str) -> str:
        sentence = next(s for s in text.split(". ") if set(words(question)[-5:-1]) & set(words(s)))
        return next(
            w for w in words(sentence) if len(w) > 3 and not is_stop(w) and w.lower() not in words(question.lower())
        )

    script(model, ask, answer, monkeypatch)
    documents = Collection("one", (Document("one", title, text),))
    with Store.create(tmp_path / "store", model, tokens=16) as store:
        conversations = synthesize(
            model,
            documents,
            store,
            reconstruction="off",
            conversations=15,
            questions_per_call=8,
            calls_per_unit=2,
            top_k=5,
            question_tokens=99,
        )
    assert len(conversations) >= 0.95 * (len(conversations) + sum(conversations.dropped.values()))


def is_stop(word: str) -> bool:
    return bad_answer(word, "", word) is not None


@pytest.mark.parametrize("language", LANGUAGES)
def test_filters_know_what_is_no_good(language: str) -> None:
    title, sentences, off_topic, empty = LANGUAGES[language]
    text = " ".join(sentences)
    question, _ = next(iter(sentences.values()))[0]
    assert not is_english(text)
    assert bad_question(off_topic, title, text) == "off topic"
    assert bad_answer(empty, f"{title}: {question}", text) == "answer without substance"
    assert bad_answer(" ", question, text) == "empty answer"
    assert bad_question(question.rstrip("?？؟。") + ",", title, text) == "malformed question"


def test_words_and_units() -> None:
    assert words("नीलम बाँध") == ["नीलम", "बाँध"]  # marks do not split words
    assert words("می\u200cخواهم") == ["می\u200cخواهم"]
    assert units("红石水库 2024年") == ["红石", "石水", "水库", "2024", "年"]
    assert units("ＡＢＣ Größe") == ["abc", "grösse"]
    assert bad_question("Ποιος έχτισε το γεφύρι;", "Γεφύρι", "Το γεφύρι έχτισε ο Νίκος το 1902.") is None
    assert bad_question("Who built it;", "It", "Nikos built it.") == "malformed question"


def test_what_is_english() -> None:
    assert is_english("The cache lives in a folder, and the oldest tile is removed first when it is full.")
    assert is_english("The office is closed on Fridays.")
    assert not is_english("De brug is in 1902 geopend en heeft zeven bogen, een molen en een poort van steen.")
    assert not is_english("Le pont a été ouvert en 1902 et compte sept arches, un moulin et une porte en pierre.")


def test_a_subject_tells_documents_apart() -> None:
    """A rare word, a word of the title that few titles have, or a name from code; otherwise the title is put in front."""
    names = ("Alder", "Birch", "Cedar")
    texts = [f"{n} Well is old. Its lid is of oak; use --depth or max_depth. {n}s grow beside it." for n in names]
    documents = [Document(n.lower(), f"{n} Well", text) for n, text in zip(names, texts, strict=True)]
    subjects = Subjects(documents)

    def complete(question: str) -> str:
        return subjects.complete(question, "Alder Well", texts[0])

    assert complete("What grows beside the well?") == "Alder Well: What grows beside the well?"
    assert complete("Is its lid of oak?") == "Alder Well: Is its lid of oak?"
    for question in ("Where do alders grow?", "How old is Alder Well?", "What does max_depth set?", "What is --depth?"):
        assert complete(question) == question
    assert complete("Where do birches grow?").startswith("Alder Well: ")  # of another document
    assert Subjects(documents[:1]).complete("Is its lid of oak?", "Alder Well", texts[0]) == "Is its lid of oak?"
    long = Document("long", "word " * 40, "nothing else")
    assert len(Subjects([long]).complete("Why?", long.title, long.text)) < 90
