"""``python -m cas ls|show|verify|export|import|compact|merge|push|pull``: parse, call, print."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional, arg

from cas import console
from cas.errors import UserError
from cas.options import store_folder

if TYPE_CHECKING:
    from cas.model.frozen import FrozenModel
    from cas.store.store import Store

_DEFAULT_STORE = "The store; default $CAS_STORE, else the newest under runs/."
StoreOption = Annotated[str | None, arg(help=_DEFAULT_STORE)]
StoreArgument = Annotated[str | None, arg(metavar="[STORE]", help=_DEFAULT_STORE)]
JsonOption = Annotated[bool, arg(name="json", help="Print JSON.")]
Id = Annotated[str, arg(metavar="ID", help="A document's id.")]
OWN_OPTIONS = "write train, query, serve and report first, their options behind: cas train --collection DIR"
ModelOption = Annotated[
    str | None, arg(help="Where the store's model is now, if it has moved: a folder, .gguf file or Hub name.")
]
Format = Literal["safetensors", "peft", "transformers", "tokasaurus"]
_FORMATS = (
    "safetensors: a file OUT.safetensors, one cartridge as it is stored; peft: a folder, PEFT's CARTRIDGE adapter; "
    "transformers: a file OUT.safetensors and OUT.json, for generate(); tokasaurus: a folder in the folder OUT for that "
    "server, the only format that is pickled."
)
_VALUES = (
    "Keep the cartridges of a finished store in a half (bfloat16) or a quarter (int8) of the bytes; they learn no more."
)
OptionalId = Annotated[str | None, arg(metavar="[ID]", help="A document's id; without one, the store.")]


def main(arguments: Sequence[str]) -> int:
    """Run one of the commands. Returns the exit status."""
    commands = (train, query, serve, report, ls, show, verify, export, import_, compact, merge, push, pull)
    return tyro.extras.subcommand_cli_from_dict(
        {command.__name__.rstrip("_"): command for command in commands},
        prog="cas",
        description=f"{sys.modules['cas'].__doc__}\n\ncas --version prints the version.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def train() -> int:
    """Train a collection of cartridges (cas train --help)."""
    raise UserError(OWN_OPTIONS)


def query() -> int:
    """Answer questions from a store (cas query --help)."""
    raise UserError(OWN_OPTIONS)


def serve() -> int:
    """Answer questions over HTTP, as OpenAI's API does (cas serve --help)."""
    raise UserError(OWN_OPTIONS)


def report() -> int:
    """Compare a store with RAG and write a report (cas report --help)."""
    raise UserError(OWN_OPTIONS)


def ls(store: StoreOption = None, as_json: JsonOption = False) -> int:
    """List the cartridges of a store."""
    rows = list(_open(store).rows().values())
    if as_json:
        print(console.to_json([asdict(row) for row in rows]))
        return 0
    width = max([2, *(len(row.id) for row in rows)])
    print(f"{'id':{width}}  positions  tokens  steps  trained tokens  title")
    for row in rows:
        figures = f"{row.p:9}  {row.tokens:6}  {row.steps:5}  {row.trained_tokens:14,}"
        print(console.harmless(f"{row.id:{width}}  {figures}  {row.title}"))
    return 0


def show(id: Positional[OptionalId] = None, store: StoreOption = None, as_json: JsonOption = False) -> int:
    """Show what a store or one cartridge is."""
    opened = _open(store)
    if id is not None:
        about = asdict(opened.row(id))
    else:
        rows, run = opened.rows(), opened.run_state() or {}
        about = {
            **opened.meta,
            "folder": str(opened.folder),
            "documents": len(rows),
            "cartridge_positions": sum(r.p for r in rows.values()),
            "document_tokens": sum(r.tokens for r in rows.values()),
            "step": run.get("step", 0),
            "total_steps": run.get("settings", {}).get("total_steps"),
        }
    if as_json:
        print(console.to_json(about))
        return 0
    if id is None:
        about["model"] = about["model"]["source"]["name"].removeprefix("package:")  # --json has all about it
    for key, value in about.items():
        if value is None:  # does not apply
            continue
        plain = isinstance(value, (str, int, float))
        print(console.harmless(f"{key}: {value if plain else json.dumps(value, ensure_ascii=False)}"))
    return 0


def verify(store: StoreOption = None) -> int:
    """Read everything back; names what is broken and exits 1."""
    opened = _open(store)
    broken = opened.verify()
    for line in broken:
        print(console.harmless(line))
    rows = opened.rows().values()
    without = sum(not row.initialized for row in rows)
    print(
        f"{opened.folder}: {len(rows)} cartridges, {f'{without} without values yet, ' * (without > 0)}{len(broken)} broken"
    )
    return 1 if broken else 0


def export(
    words: Positional[Annotated[tuple[str, ...], arg(metavar="ID... OUT", help="Documents, then a file or folder.")]],
    format: Annotated[Format, arg(help=_FORMATS)] = "safetensors",
    model: ModelOption = None,
    store: StoreOption = None,
) -> int:
    """Write cartridges for other libraries (docs/exchange.md); several are composed in the order given."""
    from cas.exchange.formats import export as write

    if len(words) < 2:
        raise UserError("name what to export, and where to: cas export ID... OUT")
    with _open(store) as opened:
        for line in write(opened, words[:-1], Path(words[-1]), format, partial(_load_model, model)):
            print(console.harmless(line))
    return 0


def import_(
    folder: Positional[Annotated[str, arg(metavar="FOLDER", help="A CARTRIDGE adapter of PEFT, or a folder of them.")]],
    store: StoreOption = None,
    id: Annotated[str | None, arg(help="Its id; default the exported one's, else the folder's name.")] = None,
    text: Annotated[str | None, arg(help="A file with the document's text, so that retrieval finds it.")] = None,
    model: ModelOption = None,
) -> int:
    """Add cartridges that were trained elsewhere to a finished store of the same model (docs/exchange.md)."""
    from cas.exchange.imported import import_adapters
    from cas.store.store import Store

    with Store.open(store_folder(store), write=True) as opened:
        opened.refuse_unfinished()  # before a model is loaded
        loaded = _load_model(model, opened)
        for line in import_adapters(opened, loaded, Path(folder), id=id, text=Path(text) if text else None):
            print(console.harmless(line))
    return 0


def compact(
    folder: Positional[StoreArgument] = None,
    store: StoreOption = None,
    values: Annotated[Literal["bfloat16", "int8"] | None, arg(help=_VALUES)] = None,
) -> int:
    """Give the space of dropped and replaced cartridges back to the disk; with --values, store the others smaller."""
    from cas.store.files import compact as compact_file
    from cas.store.store import Store

    if folder is not None and store is not None:
        raise UserError("name one store: compact STORE, or compact --store STORE")
    with Store.open(store_folder(folder or store), write=True) as opened, opened.training():
        if values is not None:
            from cas.store.files import lock_alone
            from cas.store.values import compact_values

            lock_alone(opened.folder, opened.records.descriptor)  # before anything is written
            compact_values(opened, values)
        before, after = compact_file(opened.records.environment, opened.records.descriptor)
        print(console.harmless(f"{opened.folder}: {before:,} bytes, now {after:,}"))
    return 0


def merge(
    target: Positional[Annotated[str, arg(metavar="NEW", help="Folder of the merged store.")]],
    stores: Positional[Annotated[tuple[str, ...], arg(metavar="STORE", help="Finished stores of one model.")]],
) -> int:
    """Make one store of several that were trained apart: same model, same settings of cartridges."""
    from cas.store.merge import join_indexes, merge_stores

    with merge_stores(Path(target), list(map(Path, stores))) as merged:
        join_indexes(merged, list(map(Path, stores)))
        print(console.harmless(f"{merged.folder}: {len(merged.rows())} cartridges of {len(stores)} stores"))
    return 0


def push(
    name: Positional[Annotated[str, arg(metavar="NAME", help="Repository on the Hugging Face Hub, owner/name.")]],
    ids: Positional[Annotated[tuple[str, ...], arg(metavar="[ID...]", help="Documents; without any, all.")]] = (),
    store: StoreOption = None,
    public: Annotated[bool, arg(help="Make a new repository public; without it, it is private.")] = False,
) -> int:
    """Upload a finished store, or single cartridges of it, with the documents' texts (docs/exchange.md)."""
    from cas.exchange.hub import push as upload

    with _open(store) as opened:
        print(console.harmless(f"{opened.folder} -> {upload(opened, name, ids, public=public)}"))
    return 0


def pull(
    name: Positional[Annotated[str, arg(metavar="NAME", help="Repository on the Hugging Face Hub, owner/name.")]],
    ids: Positional[Annotated[tuple[str, ...], arg(metavar="[ID...]", help="Documents; without any, all.")]] = (),
    store: Annotated[str | None, arg(help="Folder of the new store; default runs/ and the repository's name.")] = None,
    revision: Annotated[str | None, arg(help="Branch, tag or commit; default the newest.")] = None,
) -> int:
    """Download a store, or single cartridges of one, into a new store, and verify it."""
    from cas.exchange.hub import pull as download

    with download(name, Path(store or f"runs/{name.split('/')[-1]}"), ids, revision) as pulled:
        print(console.harmless(f"{name} -> {pulled.folder}: {len(pulled.rows())} cartridges, verified"))
    return 0


def _load_model(name: str | None, store: Store) -> FrozenModel:
    from cas.model.frozen import FrozenModel

    with console.Display("loading", passing=True):
        return FrozenModel.from_store(store, name)


def _open(store: str | None) -> Store:
    from cas.store.store import Store

    return Store.open(store_folder(store))
