"""The page that the Hub shows about a store."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LISTED = 20  # documents named on the page


def card(about: Mapping[str, Any], name: str) -> str:
    """Markdown with metadata of a store's record (:mod:`cas.exchange.parcel`), for the repository ``name``."""
    import yaml

    model, documents = about["model"], about["documents"]
    base = str(model["source"]["name"]).removeprefix("package:")
    front: dict[str, Any] = {"library_name": "cas-cartridges", "tags": ["cartridge", "kv-cache"]}
    if model["source"]["kind"] in ("hub", "package") and "/" in base:
        front["base_model"] = base
    positions = sum(d["p"] for d in documents)
    tokens = sum(d["tokens"] for d in documents)
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {_plain(name)}",
        f"{len(documents)} cartridges for `{_plain(base)}`: small KV caches, each trained to stand in for one document "
        f"({tokens:,} tokens in {positions:,} positions, {about['values']} values). They work with exactly this model "
        f"(fingerprint `{_plain(model['fingerprint'])}`), and the texts of the documents come with them.",
        "With Cartridges at Scale (`cas-cartridges`) installed:",
        f'```\ncas pull {_plain(name)} --store cartridges\ncas query --store cartridges "Your question?"\n```',
        "| document | title | positions |\n|---|---|---|",
    ]
    rows = [f"| `{_plain(d['id'])}` | {_plain(d['title'])} | {d['p']} |" for d in documents[:_LISTED]]
    if (more := len(documents) - _LISTED) > 0:
        rows.append(f"| and {more} more | | |")
    return "\n\n".join(lines) + "\n" + "\n".join(rows) + "\n"


def _plain(text: str) -> str:
    """Text that ends no cell, code or line of a page and begins no tag."""
    return re.sub(r"[`|<>\[\]\s]+", " ", text).strip()[:200]
