"""The report's files: ``report.md``, and ``report.html``, a single file with its charts in the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from cas.evaluation.recording import Prediction
from cas.report.charts import charts
from cas.report.view import View, title_of

TEMPLATE = Path(__file__).parent / "report.html.j2"


def write_pages(
    folder: Path, run: Mapping[str, Any], predictions: Sequence[Prediction], texts: Mapping[str, tuple[str, str]]
) -> None:
    """Write ``report.md`` and ``report.html``.

    ``texts``: question and gold answer by question id; empty keeps them out.
    """
    view = View(run, predictions, texts)
    (folder / "report.md").write_text(markdown(view), encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(view=view, charts=charts(view))
    (folder / "report.html").write_text(page, encoding="utf-8")


def markdown(view: View) -> str:
    """The report as Markdown."""
    columns = {
        "arm": "title",
        view.metric: "score",
        "F1": "f1",
        "tokens": "tokens",
        "all prompt tokens": "prompt",
        "KV MiB": "kv",
        "first token ms": "first",
        "answer ms": "answer",
    }
    if view.price_title:
        columns[view.price_title] = "price"
    caption = (
        f"Percent: {view.unit}; 95 % intervals over documents. Tokens: what stands where the document goes, text or "
        "cartridge positions. Milliseconds: median / 95th percentile, one question at a time, finding and loading included."
    )
    arms = _table(list(columns), [[row[key] for key in columns.values()] for row in view.rows()])
    sections = [("All arms", [caption, "", *arms])]
    if view.kinds:
        rows = [[title, *cells] for title, cells in view.kind_rows()]
        sections.append(("By kind of question", _table(["arm", *view.kinds], rows)))
    pair = f"{title_of(view.main)} beside {title_of(view.baseline)}."
    wins = _table(["kind", "both", "only CAS", "only RAG", "neither"], view.win_rows())
    sections.append(("Who answers what", [pair, "", *wins]))
    caption = "Points, paired by question; p-values by sign flips of documents, Holm-corrected."
    tests = _table(["first", "second", "first minus second", "p", "better"], view.test_rows())
    sections.append(("Differences", [caption, "", *tests]))
    retrieval = [[title, *cells] for title, cells in view.retrieval_rows()]
    sections.append(("Retrieval of documents", _table(["ranking", *view.retrieval_columns()], retrieval)))
    sections.append(("RAG's settings", _table(["tokens", "setting", "how it was found"], view.setting_rows())))
    sections.append(("The run", _table(["", ""], view.facts())))
    lines = [f"# {view.title}", "", *(f"- {sentence}" for sentence in [*view.verdict(), *view.cost()])]
    for title, section in sections:
        lines += ["", f"## {title}", "", *section]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    def line(row: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]
