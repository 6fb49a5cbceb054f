"""What the report says, as plain values, from what the run recorded.

Everything follows from ``results.json`` and the predictions; nothing is chosen by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from cas.evaluation.arms import FULL_DOCUMENT, NO_CONTEXT, ORACLE, Arm
from cas.evaluation.metrics import holm, interval, sign_flip
from cas.evaluation.recording import Prediction

SIGNIFICANT = 0.05  # corrected p-values below this show a difference
Figures = Mapping[str, Mapping[str, float]]

UNITS = {
    "exact_match": "answered exactly",
    "contains": "answers that contain the right one",
    "f1": "word F1",
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
}
TITLES = {
    "no_context": "no context",
    "oracle": "the right cartridges (oracle)",
    "isolated_oracle": "the right cartridges, isolated training",
    "all_resident": "all cartridges loaded",
    "full_document": "the right documents' text",
    "compressed": "the right documents' KV cache, pruned by kvpress to the cartridges' size",
    "truncated": "the collection's text, cut at the window",
    "monolithic": "one cartridge for all documents",
}


def pairs_to_test(arms: Sequence[Arm], main: Arm, measurements: Figures) -> list[tuple[Arm, Arm]]:
    """The pairs of arms whose difference is tested: every number of retrieved cartridges with RAG at about half as many
    to eight times as many tokens; ``main``, which the verdict is about, with RAG at any budget and with related arms."""
    pairs: list[tuple[Arm, Arm]] = []
    for arm in (a for a in arms if is_retrieved(a)):
        tokens = measurements[f"{arm}.context_tokens"]["mean"]
        near = [b for b in arms if b.size is not None and (arm == main or tokens * 0.4 <= b.size <= tokens * 8.5)]
        pairs += [(arm, b) for b in near]
        pairs += [(arm, b) for b in (Arm("monolithic"), replace(arm, training="isolated")) if b in arms]
        pairs += [(b, arm) for b in (replace(arm, chunk=True),) if b in arms]
    related = [
        (main, NO_CONTEXT),
        (FULL_DOCUMENT, main),
        (ORACLE, main),
        (main, Arm("all_resident")),
        (main, Arm("truncated")),
        (FULL_DOCUMENT, ORACLE),
        (ORACLE, replace(ORACLE, training="isolated")),
        (ORACLE, Arm("compressed")),
    ]
    return pairs + [pair for pair in related if {*pair} <= {*arms}]


def is_retrieved(arm: Arm) -> bool:
    """Whether an arm loads retrieved cartridges of the main store and nothing else."""
    return arm.kind == "cas" and not arm.training and not arm.chunk


def by_kind(predictions: Sequence[Prediction], kinds: Mapping[str, str], metric: str) -> dict[str, dict[str, float]]:
    """``<arm>@<kind>.<metric>`` in percent, where there are several kinds of question. ``kinds``: by question id."""
    groups: dict[tuple[str, str], list[Prediction]] = {}
    if len(set(kinds.values())) > 1:
        for p in predictions:
            groups.setdefault((p["arm"], kinds[p["question_id"]] or "other"), []).append(p)
    figures = {}
    for (arm, kind), group in groups.items():
        values = [100 * p["scores"][metric] for p in group]
        figures[f"{arm}@{kind}.{metric}"] = asdict(interval(values, [p["document_id"] for p in group]))
    return figures


def pair_tests(run: Mapping[str, Any], predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """For every compared pair ``a``, ``b`` (arms): difference and interval, p-value ``p`` (sign flips of documents),
    and ``p_holm``, corrected for the number of pairs."""
    metric = run["settings"]["metric"]
    by_arm: dict[str, dict[str, Prediction]] = {}
    for p in predictions:
        by_arm.setdefault(p["arm"], {})[p["question_id"]] = p
    tests = []
    for a, b in run["compare"]:
        pairs = [(first, by_arm[b][i]) for i, first in by_arm[a].items()]
        first_values, second_values = ([p[side]["scores"][metric] for p in pairs] for side in (0, 1))
        value = sign_flip(first_values, second_values, [first["document_id"] for first, _ in pairs])
        tests.append({"a": Arm.parse(a), "b": Arm.parse(b), "p": value, **run["metrics"][f"{a}_minus_{b}.{metric}"]})
    for test, corrected in zip(tests, holm([t["p"] for t in tests]), strict=True):
        test["p_holm"] = corrected
    return tests


def title_of(arm: Arm) -> str:
    """An arm in words."""
    if arm.kind == "rag":
        return f"RAG, {arm.size} tokens"
    if arm.kind != "cas":
        return TITLES.get(str(arm), str(arm))
    title = f"{arm.k} cartridge{'s' * (arm.k != 1)} retrieved"
    return title + ", isolated training" * bool(arm.training) + " and one chunk" * arm.chunk


class View:
    """What the report says. ``texts``: question and gold answer by question id; empty keeps them out."""

    def __init__(
        self, run: Mapping[str, Any], predictions: Sequence[Prediction], texts: Mapping[str, tuple[str, str]]
    ) -> None:
        self.run, self.texts, self.settings = run, texts, run["settings"]
        self.metric = self.settings["metric"]
        self.unit = UNITS[self.metric]
        self.arms = [Arm.parse(name) for name in dict.fromkeys(p["arm"] for p in predictions)]
        self.main = Arm.parse(self.settings["main_arm"])
        self.names = {arm: title_of(arm) for arm in self.arms}
        self.tests = pair_tests(run, predictions)
        self._predictions: dict[str, dict[str, Prediction]] = {}  # by arm and question
        for p in predictions:
            self._predictions.setdefault(p["arm"], {})[p["question_id"]] = p
        measured = [key for key in run["measurements"] if "@" in key.split(".")[0]]
        self.kinds = list(dict.fromkeys(key.split("@")[1].rpartition(".")[0] for key in measured))
        self.title = f"RAG and CAS on {run['collection']['name']}"

    def figure(self, arm: Arm | str, name: str | None = None) -> Mapping[str, float]:
        """A metric (the deciding one unless named) or measurement of an arm."""
        key = f"{arm}.{name or self.metric}"
        return self.run["metrics"].get(key) or self.run["measurements"][key]

    def cell(self, arm: Arm | str, name: str | None = None) -> str:
        """:meth:`figure` with its interval."""
        f = self.figure(arm, name)
        return f"{f['mean']:.1f} [{f['low']:.1f}, {f['high']:.1f}]"

    def pareto_front(self) -> list[Arm]:
        """The arms that retrieve and that no other such arm beats with as few tokens, by their tokens."""
        found = [a for a in self.arms if a.kind in ("cas", "rag") and not a.training]
        found.sort(key=lambda a: (self.figure(a, "context_tokens")["mean"], -self.figure(a)["mean"]))
        front: list[Arm] = []
        for arm in found:
            if not front or self.figure(arm)["mean"] > self.figure(front[-1])["mean"]:
                front.append(arm)
        return front

    def test(self, a: Arm, b: Arm) -> Mapping[str, Any]:
        """The test of a against b."""
        return next(t for t in self.tests if (t["a"], t["b"]) == (a, b))

    @cached_property
    def baselines(self) -> dict[str, Arm]:
        """RAG at as many tokens as the verdict's arm, at three times as many, and at its best."""
        tokens = self.figure(self.main, "context_tokens")["mean"]
        rag = {t["b"].size: t["b"] for t in self.tests if t["a"] == self.main and t["b"].kind == "rag"}

        def largest(limit: float) -> Arm:
            return rag[max([size for size in rag if size <= limit * 1.02] or [min(rag)])]

        return {
            "as many tokens": largest(tokens),
            "three times the tokens": largest(3 * tokens),
            "RAG's best budget": rag[max(rag, key=lambda size: (self.figure(rag[size])["mean"], -size))],
        }

    @property
    def baseline(self) -> Arm:
        """RAG at three times the tokens, which questions and costs are compared with."""
        return self.baselines["three times the tokens"]

    def verdict(self) -> list[str]:
        """Sentences, those where RAG wins first."""
        verdicts: list[tuple[int, str]] = []
        for budget, baseline in self.baselines.items():
            t = self.test(self.main, baseline)
            significant = t["p_holm"] < SIGNIFICANT
            rank = 0 if significant and t["mean"] < 0 else 2 if significant else 1
            outcome = ("RAG wins", "no difference is shown", "CAS wins")[rank]
            cas, rag = (f"{self.figure(arm)['mean']:.1f} %" for arm in (self.main, baseline))
            setting = self.settings["rag"][str(baseline.size)]["said"]
            sentence = (
                f"At {budget} {outcome}: {cas} over {title_of(self.main)} against {rag} ({title_of(baseline)}, {setting}), "
                f"{_points(t)}, p = {t['p_holm']:.3f} after correction."
            )
            verdicts.append((rank, sentence))
        sentences = [sentence for _, sentence in sorted(verdicts, key=lambda v: v[0])]
        if {FULL_DOCUMENT, self.main} <= {*self.arms}:
            t = self.test(FULL_DOCUMENT, self.main)
            sentences.append(
                "With the right documents' whole text in the prompt, an upper reference without retrieval, it is "
                f"{self.figure(FULL_DOCUMENT)['mean']:.1f} %, {_points(t)}."
            )
        return sentences

    def cost(self) -> list[str]:
        """Sentences on latency, memory, training, and when training has paid for itself."""
        cas_s, rag_s = (self.figure(arm, "first_token_s")["mean"] for arm in (self.main, self.baseline))
        kv = [self.figure(arm, "kv_bytes")["mean"] / 2**20 for arm in (self.main, self.baseline)]
        sentences = [
            f"The first token comes after {cas_s * 1000:.0f} ms over {title_of(self.main)} and after "
            f"{rag_s * 1000:.0f} ms with {title_of(self.baseline)}, finding and loading included; they hold "
            f"{kv[0]:.2f} and {kv[1]:.2f} MiB of KV cache."
        ]
        cost = self.settings["cost"]
        names = {"self_study_s": "self-study", "starts_s": "initialization", "training_s": "training"}
        spent = sum(cost[key] for key in names if cost[key] is not None)
        parts = ", ".join(
            f"{name} {'not recorded' if cost[key] is None else _duration(cost[key])}" for key, name in names.items()
        )
        sentences.append(
            f"Training took {_duration(spent)} ({parts}) on the machine that did it: {cost['trained_tokens']:,} tokens "
            f"of conversation for {self.settings['tokens']:,} tokens of documents."
        )
        if hour := self.settings.get("price_hour"):
            sentences[-1] += f" At {hour:,g} an hour that is {spent / 3600 * hour:,.2f}."
        for other in (arm for arm in (self.baseline, FULL_DOCUMENT) if arm in self.arms):
            saved = self.figure(other, "answer_s")["mean"] - self.figure(self.main, "answer_s")["mean"]
            outcome = "slower: in time, training never pays for itself."
            if saved > 0:
                outcome = f"faster: in time, training has paid for itself after {spent / saved:,.0f} questions."
            sentences.append(f"Beside {title_of(other)} an answer is {abs(saved) * 1000:.0f} ms {outcome}")
        return sentences

    def rows(self) -> list[dict[str, Any]]:
        """A row per arm for the main table."""
        return [
            {
                "arm": arm,
                "title": title_of(arm),
                "score": self.cell(arm),
                "f1": self.cell(arm, "f1"),
                "tokens": f"{self.figure(arm, 'context_tokens')['mean']:,.0f}",
                "prompt": f"{self.figure(arm, 'prompt_tokens')['mean']:,.0f}",
                "kv": f"{self.figure(arm, 'kv_bytes')['mean'] / 2**20:.2f}",
                "first": self._milliseconds(arm, "first_token_s"),
                "answer": self._milliseconds(arm, "answer_s"),
                "price": " / ".join(self._prices(arm)),
                "cas": arm.kind in ("cas", "oracle", "all_resident", "monolithic"),
            }
            for arm in self.arms
        ]

    def _milliseconds(self, arm: Arm, timing: str) -> str:
        """Median and 95th percentile."""
        return " / ".join(f"{self.figure(arm, f'{timing}_p{p}')['mean'] * 1000:,.0f}" for p in (50, 95))

    @property
    def price_title(self) -> str:
        """The heading of :meth:`_prices`, or nothing if no price was given."""
        given = [("price_hour", "on this machine"), ("price_tokens", "by the token")]
        ways = [way for name, way in given if self.settings.get(name)]
        return f"1,000 questions {' / '.join(ways)}" if ways else ""

    def _prices(self, arm: Arm) -> list[str]:
        """What 1,000 questions cost, at the prices given: by the seconds of an answer, and by the tokens of the prompt
        where these are text."""
        hour, tokens = self.settings.get("price_hour"), self.settings.get("price_tokens")
        prices = [f"{self.figure(arm, 'answer_s')['mean'] * 1000 / 3600 * hour:,.2f}"] if hour else []
        if tokens:
            text = arm.kind in ("no_context", "rag", "full_document", "truncated")
            price = self.figure(arm, "prompt_tokens")["mean"] * 1000 / 1e6 * tokens
            prices.append(f"{price:,.2f}" if text else "-")
        return prices

    def kind_rows(self) -> list[tuple[str, list[str]]]:
        """Accuracy by kind of question, a row per arm."""
        return [(title_of(arm), [self.cell(f"{arm}@{kind}") for kind in self.kinds]) for arm in self.arms if self.kinds]

    def test_rows(self) -> list[tuple[str, str, str, str, str]]:
        """Every test, the smallest p-value first."""
        return [
            (
                title_of(t["a"]),
                title_of(t["b"]),
                _points(t).replace(" points", ""),
                f"{t['p_holm']:.4f}",
                ("first" if t["mean"] > 0 else "second") if t["p_holm"] < SIGNIFICANT else "not shown",
            )
            for t in sorted(self.tests, key=lambda t: (t["p_holm"], -abs(t["mean"])))
        ]

    def retrieval_rows(self) -> list[tuple[str, list[str]]]:
        """recall@k, nDCG@10 and MRR of documents, a row per ranking."""
        titles = {"vectors": "vectors", "words": "BM25", "both": "both (used for cartridges)"}
        columns = self.retrieval_columns()
        return [
            (title, [f"{self.figure(f'retrieval_{ranking}', column)['mean']:.3f}" for column in columns])
            for ranking, title in titles.items()
        ]

    def retrieval_columns(self) -> list[str]:
        """Names of the retrieval metrics."""
        return [key.split(".", 1)[1] for key in self.run["measurements"] if key.startswith("retrieval_both.")]

    def setting_rows(self) -> list[tuple[str, str, str]]:
        """RAG's setting at each budget, and how it was found."""
        rows = []
        for budget, setting in self.settings["rag"].items():
            how = "not tuned"
            if setting["tried"]:
                how = f"best of {len(setting['tried'])} on validation questions"
            elif "as_at" in setting:
                how = f"as at {setting['as_at']:,}"
            rows.append((f"{int(budget):,}", setting["said"], how))
        return rows

    def _right(self) -> dict[str, tuple[bool, bool]]:
        """By question: whether the verdict's arm, and whether its baseline answers it."""
        cas, rag = (self._predictions[str(arm)] for arm in (self.main, self.baseline))
        return {i: (cas[i]["scores"][self.metric] >= 0.5, rag[i]["scores"][self.metric] >= 0.5) for i in cas}

    def win_rows(self) -> list[tuple[Any, ...]]:
        """Of the verdict's arm and its baseline: how many questions both, only CAS, only RAG, neither answer; in all
        and by kind."""
        kinds = self.settings["kinds"]
        rows = []
        for kind in ["all", *self.kinds]:
            outcomes = [pair for i, pair in self._right().items() if kind in ("all", kinds.get(i) or "other")]
            counts = [outcomes.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))]
            rows.append((kind, *counts))
        return rows

    def examples(self, only: str, count: int = 8) -> list[dict[str, str]]:
        """Questions that only one side answers (``"cas"`` or ``"rag"``), at most ``count``, evenly over the documents:
        ids, and texts if there are any."""
        ids = [i for i, pair in self._right().items() if pair == (only == "cas", only == "rag")]
        examples = []
        for i in ids[:: max(1, len(ids) // count)][:count]:
            question, gold = self.texts.get(i, ("", ""))
            cas, rag = (
                self._predictions[str(arm)][i].get("answer", "") if self.texts else ""
                for arm in (self.main, self.baseline)
            )
            examples.append({"id": i, "question": question, "gold": gold, "cas": cas, "rag": rag})
        return examples

    def facts(self) -> list[tuple[str, str]]:
        """Everything about the run that is not a result."""
        s, h = self.settings, self.run["hardware"]
        return [
            ("collection", f"{self.run['collection']['name']}: {s['documents']} documents, {s['tokens']:,} tokens"),
            (
                "cartridges",
                f"{s['positions']:,} positions in all, {s['tokens'] / s['positions']:.1f} tokens a position",
            ),
            ("model", str(self.run["model"])),
            ("questions", f"{s['questions']} to test, none of which RAG was tuned on; {self.unit} decides"),
            ("machine", f"{h['cpu']}, {h['cores']} cores, {h['accelerator'] or 'no accelerator'}"),
            ("date", self.run["date"][:10]),
            ("command", self.run["command"]),
            *(("left out", note) for note in s["notes"]),
        ]


def _points(difference: Mapping[str, float]) -> str:
    return f"{difference['mean']:+.1f} points [{difference['low']:+.1f}, {difference['high']:+.1f}]"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
