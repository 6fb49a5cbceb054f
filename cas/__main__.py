"""``python -m cas train|query|ls|show|verify|export``: parse, call, print."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from cas import __version__, console
from cas.config import store_folder
from cas.errors import UserError

if TYPE_CHECKING:
    from cas.store.store import Store


def main(arguments: Sequence[str] | None = None) -> int:
    """Dispatch one command. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["train"]:
        from cas.train import main as train

        return train(arguments[1:])
    if arguments[:1] == ["query"]:
        from cas.query import main as query

        return query(arguments[1:])
    options = _parser().parse_args(arguments)
    return console.run(lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("cas", description="Cartridges at Scale: one small trained KV cache per document.")
    parser.add_argument("--version", action="version", version=f"cas {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="train a collection of cartridges (cas train --help)", add_help=False)
    commands.add_parser("query", help="answer questions from a store (cas query --help)", add_help=False)
    texts = {
        "ls": "list the cartridges of a store",
        "show": "what a store or one cartridge is",
        "verify": "read everything back; names what is broken and exits 1",
        "export": "write one cartridge as a safetensors file",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--store", help="the store; default $CAS_STORE, else the newest under runs/")
        if name in ("ls", "show"):
            command.add_argument("--json", action="store_true", help="print JSON")
        if name == "show":
            command.add_argument("id", nargs="?", help="a document id")
        if name == "export":
            command.add_argument("id", help="a document id")
            command.add_argument("file", help="where to write, FILE.safetensors")
    return parser


def _run(options: argparse.Namespace) -> int:
    from cas.store.store import Store

    store = Store.open(store_folder(options.store))
    if options.command == "ls":
        return _ls(store, options.json)
    if options.command == "show":
        return _show(store, options.id, options.json)
    if options.command == "export":
        if not options.file.endswith(".safetensors"):
            raise UserError(f"{options.file}: name the file *.safetensors")
        store.export(options.id, options.file)
        print(f"{options.id} -> {options.file}")
        return 0
    broken = store.verify()
    for line in broken:
        print(line)
    print(f"{store.folder}: {len(store.rows())} cartridges, {len(broken)} broken")
    return 1 if broken else 0


def _ls(store: Store, as_json: bool) -> int:
    rows = list(store.rows().values())
    if as_json:
        print(json.dumps([asdict(row) for row in rows], ensure_ascii=False))
        return 0
    width = max([2, *(len(row.id) for row in rows)])
    print(f"{'id':{width}}  positions  tokens  steps  trained tokens  title")
    for row in rows:
        print(f"{row.id:{width}}  {row.p:9}  {row.tokens:6}  {row.steps:5}  {row.trained_tokens:14,}  {row.title}")
    return 0


def _show(store: Store, document: str | None, as_json: bool) -> int:
    if document is not None:
        about = asdict(store.row(document))
    else:
        rows, run = store.rows(), store.run_state() or {}
        about = {
            **store.meta,
            "folder": str(store.folder),
            "documents": len(rows),
            "cartridge_positions": sum(r.p for r in rows.values()),
            "document_tokens": sum(r.tokens for r in rows.values()),
            "step": run.get("step", 0),
            "total_steps": run.get("settings", {}).get("total_steps"),
        }
    if as_json:
        print(json.dumps(about, ensure_ascii=False))
        return 0
    for key, value in about.items():
        print(
            f"{key}: {value if isinstance(value, (str, int, float, type(None))) else json.dumps(value, ensure_ascii=False)}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
