"""Stores to a Hub and back, over HTTP; and what a stranger's repository may not do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TEXTS
from helpers_commands import call
from helpers_exchange import QUESTION, sized_store
from helpers_hub import Hub, running_hub
from safetensors.torch import load, save

from cas import __main__ as tool
from cas.answering.answerer import Answerer
from cas.data.collection import Collection, Document
from cas.exchange.model_card import card
from cas.exchange.parcel import files_of
from cas.model.frozen import FrozenModel
from cas.store.records import hashed, record
from cas.store.store import Store
from cas.store.values import compact_values
from cas.training.rounds import plan_round
from retrieval import HashEmbedder

NAME = "somebody/manuals"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub on this machine, in the place of the real one, and the tests' own folder for its client."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield running


@pytest.fixture
def model(tiny: Callable[..., FrozenModel]) -> FrozenModel:
    return tiny("llama")


@pytest.fixture
def store(tmp_path: Path, model: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished store of three documents, closed, and the current directory beside it."""
    sized_store(tmp_path / "store", model, "sequential").close()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "store"


def pushed(*words: str) -> str:
    status, out, err = call(tool.main, "push", NAME, *words, "--store", "store")
    assert status == 0, err
    return out


def same(a: Path, b: Path, ids: list[str]) -> bool:
    """Whether both stores have these documents, texts and cartridges, bit for bit."""
    with Store.open(a) as one, Store.open(b) as other:
        rows = [replace(s.row(i), version=0, round=0, state_hash=None) for i in ids for s in (one, other)]
        texts = [s.text(i) for i in ids for s in (one, other)]
        kv = [s.cartridge(i) for i in ids for s in (one, other)]
        pairs = all(x == y for x, y in zip(rows[::2] + texts[::2], rows[1::2] + texts[1::2], strict=True))
        return pairs and all(map(torch.equal, kv[::2], kv[1::2])) and other.verify() == []


def test_a_store_that_was_pushed_and_pulled_answers_as_before(hub: Hub, store: Path, model: FrozenModel) -> None:
    assert pushed() == f"store -> {hub.address}/{NAME}\n"
    assert hub.private == {NAME: True} and "Bearer hf_of_a_test" in hub.tokens
    assert set(hub.files[NAME]) == {".gitattributes", "README.md", "store.json"} | {
        place for i in ("crane", "ferry", "lamp") for place in files_of(i)
    }
    assert set(load(hub.files[NAME][f"cartridges/{hashed('crane')}.safetensors"])) == {"kv"}
    status, out, err = call(tool.main, "pull", NAME, "--store", "pulled")
    assert (status, out) == (0, f"{NAME} -> pulled: 3 cartridges, verified\n"), err
    assert same(store, Path("pulled"), ["crane", "ferry", "lamp"])
    assert sorted(p.name for p in Path("pulled").iterdir()) == ["cartridges.lmdb", "cartridges.lmdb-lock"]
    assert not [p for p in Path().iterdir() if p.name.startswith("pulled.")]
    with Store.open(store) as ours, Store.open("pulled") as theirs:
        first, second = (
            Answerer(model, s, HashEmbedder()).ask(QUESTION, k=2, max_new_tokens=6) for s in (ours, theirs)
        )
        assert first.text == second.text and [c.id for c in first.cartridges] == [c.id for c in second.cartridges]
        assert plan_round(theirs, documents_of(theirs)).learners == ()  # they learn no more


def documents_of(store: Store) -> Collection:
    return Collection("c", tuple(Document(*fields) for fields in store.texts()))


def test_single_cartridges_travel_alone(hub: Hub, store: Path) -> None:
    pushed()
    hub.log.clear()
    status, out, err = call(tool.main, "pull", NAME, "lamp", "--store", "one")
    assert (status, out) == (0, f"{NAME} -> one: 1 cartridges, verified\n"), err
    assert same(store, Path("one"), ["lamp"])
    assert not [line for line in hub.log if hashed("crane") in line]  # and nothing else was fetched
    pushed("ferry", "crane")  # from now on the repository holds these
    assert {p for p in hub.files[NAME] if "/" in p} == {*files_of("ferry"), *files_of("crane")}
    assert call(tool.main, "pull", NAME)[0] == 0 and same(store, Path("runs/manuals"), ["crane", "ferry"])
    for words, line in (
        (["pull", NAME, "lamp", "--store", "two"], "there is no cartridge 'lamp'; it has ferry, crane"),
        (["pull", NAME], "runs/manuals exists already; name a new folder as --store"),
        (["push", NAME, "lomp", "--store", "store"], "has no cartridge 'lomp'"),
    ):
        status, _, err = call(tool.main, *words)
        assert status == 2 and err.count("\n") == 1 and line in err, err
    assert not Path("two").exists()


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_compacted_values_travel_as_they_are(values: Any, hub: Hub, store: Path) -> None:
    with Store.open(store, write=True) as opened, opened.training():
        compact_values(opened, values)
    pushed("--public")
    assert hub.private == {NAME: False}
    assert call(tool.main, "pull", NAME, "--store", "pulled")[0] == 0
    assert same(store, Path("pulled"), ["crane", "ferry", "lamp"])
    with Store.open("pulled") as pulled:
        assert pulled.meta["values"] == values and pulled.meta["format"] == 4


def change(**fields: Any) -> Callable[[dict[str, bytes]], None]:
    """Set fields of store.json; ``a__b`` is a field of a field."""

    def spoil(files: dict[str, bytes]) -> None:
        about = json.loads(files["store.json"])
        for place, value in fields.items():
            *outer, last = place.split("__")
            target = about
            for name in outer:
                target = target[int(name)] if name.isdigit() else target[name]
            target[last] = value
        files["store.json"] = json.dumps(about).encode()

    return spoil


def cartridge(made: Callable[[torch.Tensor], torch.Tensor], metadata: Any = None) -> Callable[[dict[str, bytes]], None]:
    """Another tensor in the place of one."""

    def spoil(files: dict[str, bytes]) -> None:
        place = files_of("lamp")[0]
        files[place] = save({"kv": made(load(files[place])["kv"]).contiguous()}, metadata)

    return spoil


def nan(kv: torch.Tensor) -> torch.Tensor:
    kv[0, 0, 0, 0, 0] = float("nan")
    return kv


def put(place: str, content: bytes | None) -> Callable[[dict[str, bytes]], Any]:
    return lambda files: files.pop(place) if content is None else files.update({place: content})


TAMPERED: dict[str, tuple[Callable[[dict[str, bytes]], Any], str]] = {
    "no record": (put("store.json", None), "somebody/manuals"),
    "no JSON": (put("store.json", b"{"), "is not that of a store of CAS"),
    "deep": (put("store.json", b"[" * 10**5), "is not that of a store of CAS"),
    "list": (put("store.json", b"[]"), "is not that of a store of CAS"),
    "newer": (change(format=2), "format 2, this version reads 1"),
    "values": (change(values="pickle"), "is not that of a store of CAS"),
    "positions": (change(positions="up"), "unknown positions 'up'"),
    "geometry": (change(model__geometry__layers="3"), "is not that of a store of CAS"),
    "layers": (change(model__geometry__layers=2, model__geometry__windows=[None] * 2), r"is not \[2, 2, 2, 8, 12\]"),
    "source": (change(model__source=None), "is not that of a store of CAS"),
    "size": (change(documents__2__p=12), r"'lamp': its cartridge is not \[3, 2, 2, 12, 12\]"),
    "negative": (change(documents__2__p=-4), "is not that of a store of CAS"),
    "twice": (change(documents__2__id="crane"), "an id stands there twice"),
    "path": (change(documents__2__id="../../../../etc/passwd"), "is missing or broken"),
    "no cartridge": (put(files_of("lamp")[0], None), "is missing or broken"),
    "pickled": (put(files_of("lamp")[0], b"\x80\x04cos\nsystem\n"), "is missing or broken"),
    "long": (put(files_of("lamp")[0], bytes(3 << 20)), "larger than a cartridge can be"),
    "nan": (cartridge(nan), "holds a value that is not finite"),
    "shape": (cartridge(lambda kv: kv[:, :, :, :-1]), "its cartridge is not"),
    "halves": (cartridge(lambda kv: kv.half()), "is missing or broken"),
    "metadata": (cartridge(lambda kv: kv, {"cartridge": "[]"}), "its cartridge is not"),
    "text": (put(files_of("lamp")[1], b"another text"), "its text is not the one that was packed"),
    "encoding": (put(files_of("lamp")[1], b"\xff"), "its text is not the one that was packed"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_stranger_s_repository_is_refused_and_leaves_nothing(
    case: str, hub: Hub, store: Path, tmp_path: Path
) -> None:
    pushed()
    spoil, line = TAMPERED[case]
    spoil(hub.files[NAME])
    before = sorted(p.name for p in tmp_path.iterdir())
    status, out, err = call(tool.main, "pull", NAME, "--store", "pulled")
    assert status in (1, 2) and out == "" and err.count("\n") == 1 and re.search(line, err), err
    assert [name for name in sorted(p.name for p in tmp_path.iterdir()) if name != "cache"] == before


def test_what_is_not_named_is_not_fetched(hub: Hub, store: Path) -> None:
    pushed()
    hub.files[NAME] |= {"evil.py": b"raise SystemExit", "cartridges/x.bin": b"\x80\x04.", "store.lmdb": b"x"}
    hub.log.clear()
    assert call(tool.main, "pull", NAME, "--store", "pulled")[0] == 0
    assert not [line for line in hub.log if "evil" in line or ".bin" in line or ".lmdb" in line]


def test_what_the_hub_refuses_is_one_line(hub: Hub, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, err = call(tool.main, "pull", "nobody/nothing", "--store", "pulled")
    assert status == 1 and err.startswith("cas: nobody/nothing: ") and err.count("\n") == 1, err
    status, _, err = call(tool.main, "pull", "no such name!", "--store", "pulled")
    assert status == 1 and err.startswith("cas: no such name!: ") and err.count("\n") == 1, err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, _, err = call(tool.main, "push", NAME, "--store", "store")
    assert status == 1 and "offline" in err.lower() and err.count("\n") == 1, err
    assert not Path("pulled").exists()


def test_a_store_in_training_stays(hub: Hub, store: Path) -> None:
    with Store.open(store, write=True) as opened:
        opened.commit(opened.rows(), {"step": 1, "settings": {"total_steps": 2}})
    status, _, err = call(tool.main, "push", NAME, "--store", "store")
    assert status == 2 and err == "cas: store is in training; finish it first\n" and hub.files == {}


def test_the_card_names_the_model_and_no_folder_of_ours(hub: Hub, store: Path) -> None:
    with Store.open(store, write=True) as opened:
        opened.meta["model"]["source"] = {"kind": "folder", "name": "/secret/place/my-model", "revision": None}
        opened.records.write(lambda txn: txn.put(b"meta", record(opened.meta)))
    pushed()
    everything = b"".join(v for k, v in hub.files[NAME].items() if not k.startswith("cartridges/"))
    assert b"my-model" in everything and b"secret" not in everything
    about = json.loads(hub.files[NAME]["store.json"])
    about["model"]["source"] = {"kind": "package", "name": "package:owner/small", "revision": None}
    about["documents"][0] |= {"id": "a|b`c", "title": "<script>\n# x"}
    about["documents"] *= 10
    page = card(about, "me/mine")
    front, body = page.split("---\n")[1:3]
    assert yaml.safe_load(front)["base_model"] == "owner/small"
    assert "| `a b c` | script # x | 8 |" in body and "<script>" not in body and "and 10 more" in body
    assert TEXTS["lamp"] not in page
