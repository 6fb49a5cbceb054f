"""Arms and their names, which recorded runs have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cas.errors import UserError
from cas.evaluation.arms import FULL_DOCUMENT, NO_CONTEXT, ORACLE, Arm

RESULTS = Path(__file__).parents[2] / "experiments" / "results"

NAMES = {
    "no_context": NO_CONTEXT,
    "full_document": FULL_DOCUMENT,
    "oracle": ORACLE,
    "loaded": Arm("loaded"),
    "loaded10": Arm("loaded", 10),
    "loaded10_reversed": Arm("loaded", 10, order="reversed"),
    "loaded3_nearest": Arm("loaded", 3, others="nearest"),
    "absent10": Arm("absent", 10),
    "retrieved4": Arm("retrieved", 4),
    "retrieved4_hybrid": Arm("retrieved", 4, retriever="hybrid"),
    "rag": Arm("rag"),
    "rag60": Arm("rag", size=60),
    "rag60_hybrid": Arm("rag", size=60, retriever="hybrid"),
    "joint_first_loaded10_nearest": Arm("loaded", 10, others="nearest", training="joint_first"),
    "monolithic16_loaded": Arm("loaded", training="monolithic16"),
    "cas4": Arm("cas", 4),
    "cas2_chunk": Arm("cas", 2, chunk=True),
    "isolated_cas4": Arm("cas", 4, training="isolated"),
    "isolated_oracle": Arm("oracle", training="isolated"),
    "all_resident": Arm("all_resident"),
    "monolithic": Arm("monolithic"),
    "truncated": Arm("truncated"),
    "compressed": Arm("compressed"),
}


@pytest.mark.parametrize("name", NAMES)
def test_an_arm_and_its_name_give_each_other(name: str) -> None:
    assert Arm.parse(name) == NAMES[name] and str(NAMES[name]) == name


@pytest.mark.parametrize("name", ["", "speed", "oracle3", "no_context_hybrid_", "retrieved", "absent", "loaded_ten"])
def test_an_unknown_arm_is_one_clear_line(name: str) -> None:
    with pytest.raises(UserError, match=r"there is no arm .*; arms are no_context, full_document, "):
        Arm.parse(name)


@pytest.mark.parametrize("run", ["demo", "demo_real", "joint_vs_isolated"])
def test_names_of_recorded_arms_are_read(run: str) -> None:
    for file in (RESULTS / run).glob("*/results.json"):
        for figure in json.loads(file.read_text())["metrics"]:
            for name in figure.split(".")[0].split("_minus_"):
                assert str(Arm.parse(name)) == name
