"""Claim 17: questions that need two documents, from two cartridges that were never trained together."""

from __future__ import annotations

import sys

from cas.data.collection import Question
from cas.data.worlds import TWO, make_records, two
from cas.evaluation.recording import Prediction
from cas.model.decoding import Prompt
from experiments.claims.lab import SMALL, Claim, ClaimContext, Criterion, main_of


def two_document_questions(lab: ClaimContext) -> list[Question]:
    """Every question of this world that needs two documents, in one wording of tests."""
    questions = []
    for group in range(lab.config.documents // 2):
        records = list(make_records(f"world/{lab.seed}", group, SMALL))
        for record, other in zip(records, reversed(records), strict=True):
            ids = (record.document.id, other.document.id)
            for n, asked in enumerate(two(record, other)):
                words = asked.tests[n % len(asked.tests)]
                questions.append(Question(f"{ids[0]}/t{n}", ids, words, (asked.answer,), None, TWO))
    return questions[: lab.config.questions]


def run(lab: ClaimContext) -> list[Prediction]:
    """Both cartridges, either one, both texts; after joint and after isolated training."""
    questions, predictions = two_document_questions(lab), list[Prediction]()
    for name, share in (("joint", 0.5), ("isolated", 1.0)):
        with lab.trained(name, isolation=share) as store:
            predictions += lab.ask(store, f"{name}_", ["oracle"], questions)
            if name == "joint":
                predictions += lab.ask(store, "", ["no_context", "full_document"], questions)
            kv = {i: store.cartridge(i).to(lab.model.device, lab.model.dtype) for i in store.rows()}
            for which, place in (("first", 0), ("second", 1)):
                prompts = [Prompt(lab.question_tokens(q), (q.document_ids[place],)) for q in questions]
                predictions += lab.answer(f"{name}_{which}", questions, prompts, kv, store.layout)
    return predictions


CLAIM = Claim(
    name="two_documents",
    title="Two-document questions by composition",
    paper=(
        "Cartridges trained apart and put side by side answer questions about both, better than either alone "
        "(2506.06266)."
    ),
    ours=(
        "Which of two is older, and facts about a founder whom the other document describes: both cartridges, either "
        "one, both texts."
    ),
    run=run,
    table=[
        ("no context", "no_context"),
        ("both texts", "full_document"),
        ("joint: both cartridges", "joint_oracle"),
        ("joint: the first alone", "joint_first"),
        ("joint: the second alone", "joint_second"),
        ("isolated: both cartridges", "isolated_oracle"),
        ("isolated: the first alone", "isolated_first"),
        ("isolated: the second alone", "isolated_second"),
    ],
    compare=[
        ("isolated_oracle", "isolated_first"),
        ("isolated_oracle", "isolated_second"),
        ("joint_oracle", "joint_first"),
        ("joint_oracle", "joint_second"),
        ("joint_oracle", "isolated_oracle"),
        ("full_document", "joint_oracle"),
    ],
    criteria=[
        Criterion("isolated: both are better than the first alone", "isolated_oracle_minus_isolated_first", "least", 0),
        Criterion(
            "isolated: both are better than the second alone", "isolated_oracle_minus_isolated_second", "least", 0
        ),
        Criterion("joint: both are better than the first alone", "joint_oracle_minus_joint_first", "least", 0),
        Criterion("joint: both are better than the second alone", "joint_oracle_minus_joint_second", "least", 0),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
