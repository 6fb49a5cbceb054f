"""The report of :mod:`cas.report.compare`, in Markdown and as one HTML file, from what the run recorded.

Everything in it follows from ``results.json`` and the predictions; nothing is chosen by hand. Charts are SVG in the page, in
the page's own colours, so that they follow light and dark.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cas.evaluation.metrics import holm, interval, sign_flip
from cas.evaluation.recording import Prediction

TEMPLATE = Path(__file__).parent / "report.html.j2"
SURE = 0.05  # a difference is called one below this, after correction
Figures = Mapping[str, Mapping[str, float]]


def compared(arms: Sequence[str], main: str, measured: Figures) -> list[tuple[str, str]]:
    """The pairs of arms whose difference is tested: every number of retrieved cartridges with RAG at about half as many to eight
    times as many tokens, and ``main``, which the verdict is about, with the arms around it."""
    cas = [a for a in arms if re.fullmatch(r"cas\d+", a)]
    pairs = []
    for a in cas:
        mine = measured[f"{a}.context_tokens"]["mean"]
        pairs += [(a, b) for b in arms if b.startswith("rag") and mine * 0.4 <= int(b[3:]) <= mine * 8.5]
        pairs += [(a, b) for b in ("monolithic", f"isolated_{a}") if b in arms]
        pairs += [(f"{a}_chunk", a)] if f"{a}_chunk" in arms else []
    around = [(main, "no_context"), ("full_document", main), ("oracle", main), (main, "all_resident")]
    around += [
        (main, "truncated"),
        ("full_document", "oracle"),
        ("oracle", "isolated_oracle"),
        ("oracle", "compressed"),
    ]
    return pairs + [pair for pair in around if {*pair} <= {*arms}]


def by_kind(predictions: Sequence[Prediction], kinds: Mapping[str, str], metric: str) -> dict[str, dict[str, float]]:
    """``<arm>@<kind>.<metric>`` in percent, where there are several kinds of question."""
    from dataclasses import asdict

    found: dict[tuple[str, str], list[Prediction]] = {}
    if len(set(kinds.values())) > 1:
        for p in predictions:
            found.setdefault((p["arm"], kinds[p["question_id"]] or "other"), []).append(p)
    figures = {}
    for (arm, kind), some in found.items():
        values = [100 * p["scores"][metric] for p in some]
        figures[f"{arm}@{kind}.{metric}"] = asdict(interval(values, [p["document_id"] for p in some]))
    return figures


def tests(run: Mapping[str, Any], predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Every compared pair: difference and interval, p-value (sign flips of documents), and it corrected for their number."""
    metric = run["settings"]["metric"]
    arms: dict[str, dict[str, Prediction]] = {}
    for p in predictions:
        arms.setdefault(p["arm"], {})[p["question_id"]] = p
    found = []
    for a, b in run["compare"]:
        pairs = [(first, arms[b][i]) for i, first in arms[a].items()]
        first_values, second_values = ([p[side]["scores"][metric] for p in pairs] for side in (0, 1))
        value = sign_flip(first_values, second_values, [first["document_id"] for first, _ in pairs])
        found.append({"a": a, "b": b, "p": value, **run["metrics"][f"{a}_minus_{b}.{metric}"]})
    for test, corrected in zip(found, holm([t["p"] for t in found]), strict=True):
        test["p_holm"] = corrected
    return found


def title_of(arm: str) -> str:
    """An arm in words."""
    if found := re.fullmatch(r"(isolated_)?cas(\d+)(_chunk)?", arm):
        isolated, k, chunk = found.groups()
        return f"{k} cartridge{'s' * (k != '1')} retrieved{', isolated training' * bool(isolated)}{' and one chunk' * bool(chunk)}"
    if arm.startswith("rag"):
        return f"RAG, {arm[3:]} tokens"
    return {
        "no_context": "no context",
        "oracle": "the right cartridges (oracle)",
        "isolated_oracle": "the right cartridges, isolated training",
        "all_resident": "all cartridges loaded",
        "full_document": "the right documents' text",
        "compressed": "the right documents' KV cache, pruned by kvpress to the cartridges' size",
        "truncated": "the collection's text, cut at the window",
        "monolithic": "one cartridge for all documents",
    }.get(arm, arm)


def make_report(
    folder: Path, run: Mapping[str, Any], predictions: Sequence[Prediction], texts: Mapping[str, tuple[str, str]]
) -> None:
    """Write ``report.md`` and ``report.html``. ``texts``: question and gold answer by question id; empty keeps them out."""
    import jinja2

    from cas.report.charts import charts

    view = View(run, predictions, texts)
    (folder / "report.md").write_text(view.markdown(), encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(view=view, charts=charts(view))
    (folder / "report.html").write_text(page, encoding="utf-8")


class View:
    """What the report says, as plain values."""

    def __init__(
        self, run: Mapping[str, Any], predictions: Sequence[Prediction], texts: Mapping[str, tuple[str, str]]
    ) -> None:
        self.run, self.texts, self.settings = run, texts, run["settings"]
        self.metric = self.settings["metric"]
        self.unit = {
            "exact_match": "answered exactly",
            "contains": "answers that contain the right one",
            "f1": "word F1",
            "rouge_l": "ROUGE-L",
            "chrf": "chrF",
        }[self.metric]
        self.arms = list(dict.fromkeys(p["arm"] for p in predictions))
        self.main = self.settings["main_arm"]
        self.names = {arm: title_of(arm) for arm in self.arms}
        self.tests = tests(run, predictions)
        self._scores: dict[str, dict[str, Prediction]] = {}
        for p in predictions:
            self._scores.setdefault(p["arm"], {})[p["question_id"]] = p
        self.kinds = list(
            dict.fromkeys(k.split("@")[1].rpartition(".")[0] for k in run["measurements"] if "@" in k.split(".")[0])
        )
        self.title = f"RAG and CAS on {run['collection']['name']}"

    def figure(self, arm: str, name: str | None = None) -> Mapping[str, float]:
        """A metric (the deciding one) or measurement of an arm."""
        key = f"{arm}.{name or self.metric}"
        return self.run["metrics"].get(key) or self.run["measurements"][key]

    def shown(self, arm: str, name: str | None = None) -> str:
        """It, with its interval."""
        f = self.figure(arm, name)
        return f"{f['mean']:.1f} [{f['low']:.1f}, {f['high']:.1f}]"

    def test(self, a: str, b: str) -> Mapping[str, Any]:
        """The test of a against b."""
        return next(t for t in self.tests if (t["a"], t["b"]) == (a, b))

    def rag_at(self, tokens: float) -> str:
        """The RAG arm with the largest budget up to so many tokens, among those that the verdict's arm is compared with; the
        smallest if none is so small."""
        arms = sorted(
            (t["b"] for t in self.tests if t["a"] == self.main and t["b"].startswith("rag")), key=lambda b: int(b[3:])
        )
        return max([b for b in arms if int(b[3:]) <= tokens * 1.02] or arms[:1], key=lambda b: int(b[3:]))

    @property
    def rivals(self) -> dict[str, str]:
        """RAG at as many tokens as the verdict's arm, at three times as many, and at its best."""
        mine = self.figure(self.main, "context_tokens")["mean"]
        rag = [t["b"] for t in self.tests if t["a"] == self.main and t["b"].startswith("rag")]
        best = max(rag, key=lambda b: (self.figure(b)["mean"], -int(b[3:])))
        return {
            "as many tokens": self.rag_at(mine),
            "three times the tokens": self.rag_at(3 * mine),
            "its best budget": best,
        }

    def verdict(self) -> list[str]:
        """Sentences, where RAG wins first."""
        found: list[tuple[int, str]] = []
        for how, rival in self.rivals.items():
            t = self.test(self.main, rival)
            sure = t["p_holm"] < SURE
            who = 0 if sure and t["mean"] < 0 else 2 if sure else 1
            said = ("RAG wins", "No difference is shown", "CAS wins")[who]
            mine, theirs = (f"{self.figure(arm)['mean']:.1f} %" for arm in (self.main, rival))
            found.append(
                (
                    who,
                    f"{said} against RAG at {how} ({title_of(rival)}, {self.settings['rag'][rival[3:]]['said']}): {mine} over "
                    f"{title_of(self.main)} against {theirs}, {_points(t)}, p = {t['p_holm']:.3f} after correction.",
                )
            )
        sentences = [text for _, text in sorted(found, key=lambda f: f[0])]
        if {"full_document", self.main} <= {*self.arms}:
            t = self.test("full_document", self.main)
            sentences.append(
                f"With the right documents' whole text in the prompt, which nobody has at question time, it is "
                f"{self.figure('full_document')['mean']:.1f} %, {_points(t)}."
            )
        return sentences

    def cost(self) -> list[str]:
        """Sentences on latency, memory, training, and when it has paid."""
        rival = self.rivals["three times the tokens"]
        mine, theirs = (self.figure(a, "first_token_s")["mean"] for a in (self.main, rival))
        kv = [self.figure(a, "kv_bytes")["mean"] / 2**20 for a in (self.main, rival)]
        lines = [
            f"The first token comes after {mine * 1000:.0f} ms over {title_of(self.main)} and after {theirs * 1000:.0f} ms with "
            f"{title_of(rival)}, finding and loading included; they hold {kv[0]:.2f} and {kv[1]:.2f} MiB of KV cache."
        ]
        c = self.settings["cost"]
        spent = [v for k in ("self_study_s", "starts_s", "training_s") if (v := c[k]) is not None]
        names = {"self_study_s": "self-study", "starts_s": "starts", "training_s": "training"}
        parts = ", ".join(
            f"{said} {_duration(c[k]) if c[k] is not None else 'not recorded'}" for k, said in names.items()
        )
        lines.append(
            f"Training took {_duration(sum(spent))} ({parts}) on the machine that did it: {c['trained_tokens']:,} tokens of "
            f"conversation for {self.settings['tokens']:,} tokens of documents."
        )
        for other in (rival, "full_document"):
            if other in self.arms:
                saved = self.figure(other, "answer_s")["mean"] - self.figure(self.main, "answer_s")["mean"]
                lines.append(
                    f"Beside {title_of(other)} an answer is {abs(saved) * 1000:.0f} ms "
                    + (
                        f"faster: in time, training has paid for itself after {sum(spent) / saved:,.0f} questions."
                        if saved > 0
                        else "slower: in time, training never pays for itself."
                    )
                )
        return lines

    def rows(self) -> list[dict[str, Any]]:
        """A row per arm for the main table."""
        return [
            {
                "arm": arm,
                "title": title_of(arm),
                "score": self.shown(arm),
                "f1": self.shown(arm, "f1"),
                "tokens": f"{self.figure(arm, 'context_tokens')['mean']:,.0f}",
                "prompt": f"{self.figure(arm, 'prompt_tokens')['mean']:,.0f}",
                "kv": f"{self.figure(arm, 'kv_bytes')['mean'] / 2**20:.2f}",
                "first": f"{self.figure(arm, 'first_token_s')['mean'] * 1000:,.0f}",
                "answer": f"{self.figure(arm, 'answer_s')['mean'] * 1000:,.0f}",
                "cas": not arm.startswith(("rag", "no_", "full", "trunc", "compressed")),
            }
            for arm in self.arms
        ]

    def kind_rows(self) -> list[tuple[str, list[str]]]:
        """Accuracy by kind of question, a row per arm."""
        return [
            (title_of(arm), [self.shown(f"{arm}@{kind}") for kind in self.kinds]) for arm in self.arms if self.kinds
        ]

    def test_rows(self) -> list[tuple[str, str, str, str, str]]:
        """Every test, the surest first."""
        return [
            (
                title_of(t["a"]),
                title_of(t["b"]),
                _points(t).replace(" points", ""),
                f"{t['p_holm']:.4f}",
                ("first" if t["mean"] > 0 else "second") if t["p_holm"] < SURE else "not shown",
            )
            for t in sorted(self.tests, key=lambda t: (t["p_holm"], -abs(t["mean"])))
        ]

    def retrieval_rows(self) -> list[tuple[str, list[str]]]:
        """recall@k and MRR of documents, a row per ranking."""
        names = {"vectors": "vectors", "words": "BM25", "both": "both (used for cartridges)"}
        return [
            (said, [f"{self.figure(f'retrieval_{r}', c)['mean']:.3f}" for c in self.retrieval_columns()])
            for r, said in names.items()
        ]

    def retrieval_columns(self) -> list[str]:
        """Names of the retrieval metrics."""
        return [k.split(".", 1)[1] for k in self.run["measurements"] if k.startswith("retrieval_both.")]

    def setting_rows(self) -> list[tuple[str, str, str]]:
        """RAG's setting at each budget, and how it was found."""
        rows = []
        for budget, found in self.settings["rag"].items():
            how = (
                f"best of {len(found['tried'])} on validation questions"
                if found["tried"]
                else "as at the budget before"
            )
            rows.append((f"{int(budget):,}", found["said"], how))
        return rows

    def won(self) -> list[tuple[Any, ...]]:
        """Of the verdict's arm and RAG at three times the tokens: questions both, only CAS, only RAG, neither answer; all, then by
        kind."""
        rival = self._scores[self.rivals["three times the tokens"]]
        kinds = self.settings["kinds"]
        rows = []
        for kind in ["all", *self.kinds]:
            counts = [0, 0, 0, 0]
            for i, p in self._scores[self.main].items():
                if kind in ("all", kinds.get(i) or "other"):
                    mine, theirs = (x["scores"][self.metric] >= 0.5 for x in (p, rival[i]))
                    counts[(0 if theirs else 1) if mine else (2 if theirs else 3)] += 1
            rows.append((kind, *counts))
        return rows

    def examples(self, only: str, most: int = 8) -> list[dict[str, str]]:
        """Questions that only one side answers (``"cas"`` or ``"rag"``), evenly over the documents: ids, and texts if any."""
        rival = self._scores[self.rivals["three times the tokens"]]
        ids = []
        for i, p in self._scores[self.main].items():
            mine, theirs = (x["scores"][self.metric] >= 0.5 for x in (p, rival[i]))
            if mine != theirs and mine == (only == "cas"):
                ids.append(i)
        ids = ids[:: max(1, len(ids) // most)][:most]
        found = []
        for i in ids:
            question, gold = self.texts.get(i, ("", ""))
            answers = [s[i].get("answer", "") if self.texts else "" for s in (self._scores[self.main], rival)]
            found.append({"id": i, "question": question, "gold": gold, "cas": answers[0], "rag": answers[1]})
        return found

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

    def markdown(self) -> str:
        """The report as Markdown."""
        lines = [f"# {self.title}", "", *(f"- {v}" for v in self.verdict()), *(f"- {v}" for v in self.cost()), ""]
        lines += [
            "## All arms",
            "",
            f"Percent: {self.unit}; 95 % intervals over documents. Tokens: what stands where the ",
        ]
        lines[-1] += (
            "document goes, text or cartridge positions. Milliseconds: one question at a time, finding and loading included."
        )
        head = ["arm", self.metric, "F1", "tokens", "all prompt tokens", "KV MiB", "first token ms", "answer ms"]
        keys = ("title", "score", "f1", "tokens", "prompt", "kv", "first", "answer")
        lines += ["", *_markdown_table(head, [[r[k] for k in keys] for r in self.rows()])]
        if self.kinds:
            lines += [
                "",
                "## By kind of question",
                "",
                *_markdown_table(["arm", *self.kinds], [[a, *c] for a, c in self.kind_rows()]),
            ]
        lines += [
            "",
            "## Who answers what",
            "",
            f"{title_of(self.main)} beside {title_of(self.rivals['three times the tokens'])}.",
            "",
        ]
        lines += _markdown_table(["kind", "both", "only CAS", "only RAG", "neither"], self.won())
        lines += [
            "",
            "## Differences",
            "",
            "Points, paired by question; p-values by sign flips of documents, Holm-corrected.",
            "",
        ]
        lines += _markdown_table(["first", "second", "first minus second", "p", "better"], self.test_rows())
        lines += [
            "",
            "## Retrieval of documents",
            "",
            *_markdown_table(["ranking", *self.retrieval_columns()], [[a, *c] for a, c in self.retrieval_rows()]),
        ]
        lines += [
            "",
            "## RAG's settings",
            "",
            *_markdown_table(["tokens", "setting", "how it was found"], self.setting_rows()),
        ]
        lines += ["", "## The run", "", *_markdown_table(["", ""], self.facts())]
        return "\n".join(lines) + "\n"


def _markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    def cells(row: Sequence[Any]) -> str:
        return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in row) + " |"

    return [cells(head), "|" + "---|" * len(head), *map(cells, rows)]


def _points(difference: Mapping[str, float]) -> str:
    return f"{difference['mean']:+.1f} points [{difference['low']:+.1f}, {difference['high']:+.1f}]"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
