"""The charts of the report: SVG in the page's own colors (CSS variables), so that they follow light, dark and print."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import matplotlib
import matplotlib.ticker

from cas.evaluation.arms import FULL_DOCUMENT, NO_CONTEXT, ORACLE, Arm
from cas.report.view import View, is_retrieved

# The page's colors, and what matplotlib draws in their place.
_COLORS = {name: f"#0{i}0{i}0{i}" for i, name in enumerate(("ink", "muted", "cas", "rag", "text", "line"), start=1)}


def charts(view: View) -> dict[str, str]:
    """SVG by name: accuracy against tokens before the question, KV memory, and the time to the first token."""
    axes = {
        "tokens": ("context_tokens", 1.0, "tokens of text, or cartridge positions"),
        "memory": ("kv_bytes", 2.0**20, "KV cache of one question, MiB"),
        "latency": ("first_token_s", 1e-3, "milliseconds to the first token"),
    }
    return {name: _chart(view, *axis) for name, axis in axes.items()}


def _chart(view: View, measure: str, scale: float, label: str) -> str:
    matplotlib.use("svg")
    from matplotlib import pyplot

    c = _COLORS
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "cas", "font.family": "sans-serif", "font.size": 11}
    style |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "axes.labelcolor"), c["muted"])
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(5.2, 4.4), layout="constrained")
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)

        def at(arm: Arm) -> tuple[float, Mapping[str, float]]:
            return view.figure(arm, measure)["mean"] / scale, view.figure(arm)

        def line(arms: Sequence[Arm], color: str, marker: str, name: str) -> None:
            points = [at(a) for a in arms]
            x, y = [p[0] for p in points], [p[1]["mean"] for p in points]
            spread = [[p[1]["mean"] - p[1]["low"] for p in points], [p[1]["high"] - p[1]["mean"] for p in points]]
            axes.errorbar(
                x, y, yerr=spread, fmt=f"{marker}-", color=color, ms=6, lw=1.8, elinewidth=1, capsize=2, label=name
            )

        line([a for a in view.arms if is_retrieved(a)], c["cas"], "o", "CAS, cartridges retrieved")
        line([a for a in view.arms if a.kind == "rag"], c["rag"], "s", "RAG, text retrieved")
        if measure == "context_tokens":
            front = view.pareto_front()
            axes.step(
                [at(a)[0] for a in front],
                [at(a)[1]["mean"] for a in front],
                where="post",
                color=c["muted"],
                lw=1,
                zorder=0,
            )
        markers = {
            ORACLE: "*",
            Arm("all_resident"): "P",
            Arm("monolithic"): "X",
            replace(view.main, chunk=True): "D",
        }
        for arm, marker in markers.items():
            if arm in view.arms:
                x, y = at(arm)
                axes.plot([x], [y["mean"]], marker, color=c["cas"], ms=9, label=view.names[arm])
        for arm, dash in ((FULL_DOCUMENT, "--"), (NO_CONTEXT, ":")):
            axes.axhline(view.figure(arm)["mean"], color=c["text"], ls=dash, lw=1.2, label=view.names[arm])
        axes.set_xscale("log")
        axes.set_ylim(0, max(axes.get_ylim()[1], 5.0))
        axes.set_xlabel(label)
        axes.set_ylabel(f"{view.metric.replace('_', ' ')}, percent")
        axes.grid(color=c["line"], lw=0.6)
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.6g}")
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10, labelcolor=c["ink"])
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(
        r"font: [^;\"]*;?", lambda m: re.sub(r"font: (\d+px).*", r"font-size: \1", m[0].rstrip(";")) + ";", svg
    )
    unique = re.sub(r"\W", "", measure)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{unique}-", svg)
    for name, color in c.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg
