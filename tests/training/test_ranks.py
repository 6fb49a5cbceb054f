"""Training by several ranks: how documents are dealt out, and short trainings by real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import chain, combinations
from pathlib import Path

import pytest
from helpers_ranks import free_port, write_manuals
from helpers_store import contents

from cas.data.collection import Collection
from cas.errors import ConfigError, RunError, UserError
from cas.evaluation.answers import run_arms, unseen_questions
from cas.evaluation.arms import ORACLE
from cas.evaluation.metrics import Estimate, interval
from cas.model.frozen import FrozenModel
from cas.options import Training
from cas.selfstudy.conversations import Conversations
from cas.store.store import Store
from cas.training import ranks
from cas.training.pipeline import Stopped
from cas.training.ranks import deals
from cas.training.ranks.deals import Deal
from cas.training.ranks.world import World
from retrieval import ChunkIndex, HashEmbedder

TESTS = Path(__file__).parent.parent
STORE = Path("runs/manuals")
SECONDS = 600


def environment() -> dict[str, str]:
    """For programs of the tests: this project before an installed one, and no GPU."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def trained(base: Path, *names: str) -> dict[str, str]:
    """Run :mod:`helpers_ranks`; what its first ranks said, by name."""
    program = [sys.executable, str(TESTS / "helpers_ranks.py"), str(base), *names]
    done = subprocess.run(program, capture_output=True, text=True, timeout=SECONDS, env=environment())
    said = {name: (base / name / "rank-0.log").read_text() for name in names if (base / name / "rank-0.log").exists()}
    assert done.returncode == 0, f"{done.stderr}\n{said}"
    return said


def launched(launcher: str, folder: Path, program: str, *words: str, size: int = 2) -> str:
    """Run a program of the tests, or ``-m`` a module, on ranks under a real launcher; what it printed."""
    first = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(size),
        "--master-port",
        str(free_port()),
    ]
    if launcher == "deepspeed":
        first = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--num_accelerators",
            "2",
            "--master_port",
            str(free_port()),
        ]
    done = subprocess.run(
        [*first, program if program == "-m" else str(TESTS / program), *words], capture_output=True, text=True, timeout=SECONDS, cwd=folder,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(folder: Path, drawn: int) -> None:
    """A whole, ordinary store of five trained documents, about which ``drawn`` conversations were drawn."""
    with Store.open(folder / STORE) as store:
        rows = store.rows()
        assert store.verify() == [] and len(rows) == 5
        assert all(row.steps and row.state_hash is None for row in rows.values())
        assert sum(row.drawn for row in rows.values()) == drawn
        state = store.run_state()
        assert state is not None and state["step"] == state["settings"]["total_steps"]
        conversations = Conversations.load(store.conversations)
    assert set(conversations.by_document) == set(rows) and not (folder / STORE / ranks.FOLDER).exists()
    index = ChunkIndex.load(folder / STORE / "index", HashEmbedder())
    assert index.document_ids == sorted(rows) and index.source and len(index) >= 5


def test_two_ranks_train_one_store_and_one_goes_on_where_one_of_them_is_lost(tmp_path: Path) -> None:
    said = trained(tmp_path, "whole", "fewer")
    check(tmp_path / "whole", 2 * 8 * 2)  # ranks, steps of each, conversations of a step
    assert "ranks       2, each with 2 documents or one more" in said["whole"]
    assert "trained     5 of 5 cartridges" in said["whole"] and "8 steps of every rank" in said["whole"]
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "whole" / STORE / "metrics.jsonl").read_text().splitlines()
    ]
    assert sorted(steps) == sorted([*range(8)] * 2)
    with Store.open(tmp_path / "fewer" / STORE) as store:
        drawn = sum(row.drawn for row in store.rows().values())
    assert 16 * 2 <= drawn <= 18 * 2  # what was trained is not trained again, but for half a rotation
    check(tmp_path / "fewer", drawn)


@pytest.mark.slow
def test_a_training_that_lost_a_rank_ends_as_if_it_had_not(tmp_path: Path) -> None:
    """Bit for bit, on as many ranks."""
    trained(tmp_path, "whole", "again")
    with Store.open(tmp_path / "whole" / STORE) as whole, Store.open(tmp_path / "again" / STORE) as again:
        assert contents(whole) == contents(again) and whole.run_state() == again.run_state()


@pytest.mark.slow
def test_the_next_round_trains_beside_frozen_cartridges_of_both_ranks(tmp_path: Path) -> None:
    said = trained(tmp_path, "round")["round"]
    assert "collection  2 new; the other 5 cartridges stay as they are" in said
    with Store.open(tmp_path / "round" / STORE) as store, Store.open(tmp_path / "round/runs/before") as before:
        now, then = contents(store), contents(before)
        assert now.keys() - then.keys() == {"buoy", "shed"} and now.items() >= then.items()
        assert store.round == 1 and all(store.row(name).steps for name in ("buoy", "shed")) and store.verify() == []


@pytest.mark.slow
def test_four_ranks_train_as_much_as_two(tmp_path: Path) -> None:
    trained(tmp_path, "four")
    check(tmp_path / "four", 4 * 4 * 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_gradients_of_a_model_in_parts_are_those_of_one_process(kind: str, tmp_path: Path) -> None:
    """In float32, to 1e-5; on ranks that make different numbers of forward and backward passes."""
    pytest.importorskip("deepspeed")
    launched("torchrun", tmp_path, "helpers_zero.py", kind, str(tmp_path))


@pytest.mark.slow
def test_a_training_with_a_model_in_parts_gives_the_store_of_one_without(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    stores = []
    for launcher, name, words in (("torchrun", "whole", ()), ("deepspeed", "parts", ("--zero", "3"))):
        write_manuals(tmp_path / name)
        launched(launcher, tmp_path / name, "helpers_ranks.py", *words)
        with Store.open(tmp_path / name / STORE) as store:
            assert store.verify() == []
            stores.append(contents(store))
    assert stores[0] == stores[1]


def accuracy(folder: Path) -> Estimate:
    """Share of questions about a store's documents, but for those of self-study, that its cartridges answer exactly."""
    with Store.open(folder) as store:
        assert store.verify() == []
        model, conversations = FrozenModel.from_store(store), Conversations.load(store.conversations)
        collection = Collection.load("million_tokens").select(8)
        assert {*store.rows()} == {d.id for d in collection.documents}
        questions = unseen_questions(collection.questions, conversations)
        assert len(questions) >= 40
        given = run_arms(model, store, collection, questions, [ORACLE])
    return interval([p["scores"]["exact_match"] for p in given], [p["document_id"] for p in given])


@pytest.mark.slow
def test_one_two_and_four_ranks_reach_the_same_accuracy(tmp_path: Path) -> None:
    """Held-out questions about eight documents, answered by the embedded reader: the intervals overlap."""
    found = {}
    words = "--collection million_tokens --documents 8 --conversations 768 --epochs 3 --lr 5e-2 --targets 2 --pool 4"
    for size in (1, 2, 4):
        launched(
            "torchrun", tmp_path, "-m", "cas.train", *words.split(), "--store", str(tmp_path / str(size)), size=size
        )
        found[size] = accuracy(tmp_path / str(size))
    for one, other in combinations(found.values(), 2):
        assert one.mean > 0.5 and one.low <= other.high and other.low <= one.high, found


# -- without processes ----------------------------------------------------------------------------------------------------


def test_parts_have_about_as_many_documents_and_tokens_each() -> None:
    tokens = {f"d{n}": 10 + n % 7 * 100 for n in range(1000)}
    parts = deals.cut(tokens, deals.count_parts(1000, 4))
    assert len(parts) == 4 and sorted(chain(*parts)) == sorted(tokens)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    loads = [sum(tokens[i] for i in part) for part in parts]
    assert max(loads) < 1.02 * min(loads)
    assert deals.count_parts(10_000, 8) == 40 and deals.count_parts(3, 8) == 3


def test_every_deal_mixes_the_documents_anew_and_the_same_on_every_rank() -> None:
    ids = [f"d{n:03d}" for n in range(101)]
    first, second = deals.dealt(ids, 0, 1, 4), deals.dealt(ids[::-1], 0, 2, 4)
    assert first == deals.dealt(ids[::-1], 0, 1, 4) and first != deals.dealt(ids, 1, 1, 4)
    for dealt in (first, second):
        assert sorted(chain(*dealt)) == ids and Counter(map(len, dealt)) == {25: 3, 26: 1}
    both = len(set(first[0]) & set(second[0]))
    assert 1 <= both <= 15  # a quarter of 25 expected


def test_steps_are_shared_by_the_ranks() -> None:
    training = Training(epochs=2, targets=4, per_target=8)
    assert deals.steps_of_a_rank(training, 64_000, 1000, 1) == 4000
    assert deals.steps_of_a_rank(training, 64_000, 1000, 8) == 500
    assert deals.steps_of_a_rank(training, 640, 8, 4) == 20  # two documents each: steps of two targets
    assert deals.steps_of_a_rank(Training(steps=10), 640, 8, 4) == 3


def test_documents_are_dealt_out_with_a_rotation_and_on_other_ranks_where_as_much_is_done() -> None:
    assert [deals.next_deal(s, 100, 25, 10) for s in (0, 29, 30, 90)] == [30, 30, 60, 100]
    training, before = Training(rotate_every=10), Deal(parts=4, number=3, world=4, step=60, steps=100)
    same = deals.begin_deal(before, training, 100, 4, 0.7)
    assert (same.number, same.world, same.step, same.steps) == (4, 4, 60, 100)
    fewer = deals.begin_deal(before, training, 200, 2, 0.66, skipped=3)
    assert (fewer.number, fewer.world, fewer.step, fewer.steps, fewer.skipped) == (4, 2, 130, 200, 3)
    assert not fewer.finished and not Deal(parts=4).finished and Deal(4, 1, 2, 10, 10).finished


def test_deals_move_no_more_than_rotations_do() -> None:
    assert (
        deals.deals_every(None, 10_000, 50_000, 8) == 2500
    )  # a rank's 1,250 cartridges; rotations move 2,500 meanwhile
    assert deals.deals_every(None, 10_000, 1000, 8) == 125 and deals.deals_every(70, 10_000, 1000, 8) == 70
    assert deals.deals_every(None, 4, 3, 2) == 1 and deals.deals_every(5, 10, 100, 1) == 100


def test_ranks_get_frozen_cartridges_that_they_can_show() -> None:
    frozen = [f"f{n:03d}" for n in range(100)]
    each = deals.distractors(frozen, Training(guests=0, max_distractors=10), 30, Deal(1, 1, 2, 0, 100))
    assert [len(ids) for ids in each] == [30, 30] and len({*each[0], *each[1]}) == 60  # three rotations of ten
    few = deals.distractors(frozen[:5], Training(), 1000, Deal(1, 1, 2, 0, 1000))
    assert sorted(chain(*few)) == frozen[:5]
    assert deals.distractors(frozen, Training(isolation=1.0), 30, Deal(1, 1, 2, 0, 100)) == [[], []]


def test_more_ranks_than_documents_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 ranks cannot share 5 documents; start at most 5"):
        deals.refuse_world(5, 8)
    deals.refuse_world(5, 5)


class Heard(World):
    """A world whose other ranks say what it is told."""

    others: list[object]

    def exchange(self, value: object) -> list[object]:
        return [*self.others[: self.rank], value, *self.others[self.rank :]]


@pytest.mark.parametrize(
    ("rank", "others", "error", "line"),
    [
        (0, [None, [2, "give less"]], UserError, "rank 2: give less"),
        (0, [[1, "the disk is full"], [0, ""]], RunError, "rank 1: the disk is full"),
        (0, [[0, ""], None], Stopped, ""),
        (1, [[2, "give less"], None], SystemExit, "2"),
        (1, [[0, ""], None], SystemExit, "130"),
    ],
)
def test_what_a_rank_raises_is_said_once(
    rank: int, others: list[object], error: type[BaseException], line: str
) -> None:
    world = Heard(rank, 3)
    world.others = others
    with pytest.raises(error) as raised:
        world.together(lambda: 1)
    assert str(raised.value) == line


def test_an_error_of_our_own_stays_what_it_is() -> None:
    def work() -> None:
        raise ConfigError("give less")

    world = Heard(0, 2)
    world.others = [None]
    with pytest.raises(ConfigError, match=r"^give less$"):
        world.together(work)
    assert world.together(lambda: 7) == 7


def test_the_environment_of_a_launcher_is_told_from_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert not ranks.wanted(tmp_path) and ranks.command() == ["python"] and ranks.ranks_here() == 1
    with pytest.raises(
        ConfigError, match=r"start them: torchrun --nproc-per-node N|pip install 'cas-cartridges\[deepspeed\]'"
    ):
        ranks.wanted(tmp_path, zero=3)
    (tmp_path / ranks.FOLDER).mkdir()
    assert ranks.wanted(tmp_path)  # one process goes on with what several began
    for name, value in {**names, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.launched() and ranks.world_size() == 4
    assert ranks.command() == ["torchrun", "--nproc-per-node", "2"] and ranks.ranks_here() == 2
