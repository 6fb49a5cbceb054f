"""Retrieval metrics by hand."""

from __future__ import annotations

from math import log2

import pytest

from retrieval import ndcg_at_k


def test_ndcg_by_hand() -> None:
    assert ndcg_at_k(["a", "b"], {"a"}, 10) == 1.0
    assert ndcg_at_k(["b", "a"], {"a"}, 10) == pytest.approx(1 / log2(3))
    assert ndcg_at_k(["b", "a", "c"], {"a", "c"}, 10) == pytest.approx((1 / log2(3) + 1 / 2) / (1 + 1 / log2(3)))
    assert ndcg_at_k(["b", "a"], {"a"}, 1) == ndcg_at_k([], {"a"}, 10) == 0.0
