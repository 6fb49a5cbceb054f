"""Answer metrics against hand-computed values; the bootstrap against a slow loop over the same draws."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cas.evaluation.metrics
from cas.errors import ConfigError, UserError
from cas.evaluation.metrics import Estimate, contains, exact_match, f1, interval, normalize_answer, paired_difference

WORDS = st.lists(st.sampled_from(["the", "a", "red", "valve", "Valve", "7", "bar", "-", "."]), max_size=7).map(" ".join)
TEXTS = st.one_of(WORDS, st.text(max_size=20))


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Red\tvalve!", "red valve"),
        ("an apple, a pear; the end.", "apple pear end"),
        ("U.S.", "us"),
        ("4-5 bar", "4-5 bar"),
        ("4–5 bar", "4-5 bar"),
        ("theatre another", "theatre another"),
        ("A", ""),
        ("Ärzte", "ärzte"),
        (" ... ", ""),
    ],
)
def test_normalise_answer(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "answers", "expected_match", "expected_f1", "expected_contains"),
    [
        ("The red valve.", ["red valve"], 1, 1, 1),
        ("red valve", ["valve red"], 0, 1, 0),
        # 2 words shared of 4 predicted and 2 gold: precision 1/2, recall 1.
        ("open the red valve now", ["red valve"], 0, 2 / 3, 1),
        # "valve" is shared once: precision 1/2, recall 1/3.
        ("valve valve", ["valve red hot"], 0, 2 / 5, 0),
        ("valve valve", ["valve valve red"], 0, 4 / 5, 0),
        ("17 bar", ["7 bar"], 0, 1 / 2, 0),
        ("17 bar", ["7"], 0, 0, 0),
        # The best of several gold answers counts, each metric for itself.
        ("about 7 bar", ["9 bar", "7 bar", "bar"], 0, 4 / 5, 1),
        ("no idea", ["7 bar"], 0, 0, 0),
        # No gold answer: only silence is right.
        ("", [], 1, 1, 1),
        ("...", [""], 1, 1, 1),
        ("7 bar", [], 0, 0, 0),
        ("7 bar", [""], 0, 0, 0),
        # An empty gold answer beside a real one is no gold answer.
        ("", ["", "7 bar"], 0, 0, 0),
        ("the", ["7 bar"], 0, 0, 0),
    ],
)
def test_metrics_by_hand(
    prediction: str, answers: list[str], expected_match: float, expected_f1: float, expected_contains: float
) -> None:
    assert exact_match(prediction, answers) == expected_match
    assert f1(prediction, answers) == pytest.approx(expected_f1, abs=1e-12)
    assert contains(prediction, answers) == expected_contains


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1.5 bar", "15 bar"),
        ("-5 °C", "5 °C"),
        ("−5", "5"),
        ("-$5", "$5"),
        ("C++", "C"),
        ("C#", "C"),
        ("A+", "A-"),
        ("3/4 inch", "34 inch"),
        ("4-5 bar", "45 bar"),
        ("5½", "51/2"),
        ("10⁶", "106"),
        ("10^6", "106"),
        ("10**6", "106"),
        ("1...5", "15"),
        ("12:30", "1230"),
        ("1,5", "15"),
        (".5 bar", "5 bar"),
        ("192.168.1.1", "19216811"),
        ("5 %", "5"),
        ("<5", ">5"),
        ("5 m/s", "5 ms"),
        ("max_connections", "maxconnections"),
        ("红色阀门", "蓝色阀门"),
        ("हल", "हाल"),
    ],
)
def test_marks_that_change_a_value_count(one: str, other: str) -> None:
    for prediction, gold in ((one, other), (other, one)):
        assert exact_match(prediction, [gold]) == 0
    assert not contains(f"It is {other}.", [one])
    assert exact_match(one, [one]) == contains(f"It is {one}.", [one]) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000,000", "1000000"),
        ("−5 °C", "-5°C"),
        ("５．５", "5.5"),
        ("١٫٥", "1.5"),
        ("½", "1/2"),
        ("5½", "5 1/2"),
        ("10⁻³", "10^-3"),
        ("5%", "5 per cent"),
        ("1990–1995", "1990-1995"),
        ("STRASSE", "Straße"),
        ("the pump’s “red” valve", "pump's red valve"),
        ("e‐mail", "e-mail"),
        ("cafe\u0301", "café"),
        ("«rouge»!", "rouge"),
        ("ﾊﾞﾙﾌﾞ", "バルブ"),
        ("红色，阀门。", "红色阀门"),
        ("لون أحمر؟", "لون أحمر"),
        ("लाल है।", "लाल है"),
        ("co\u00adoperate", "cooperate"),
        ("x <= 5", "x ≤5"),
        ("*the* **red** _valve_", "red valve"),
    ],
)
def test_spellings_of_one_answer_are_equal(one: str, other: str) -> None:
    assert normalize_answer(one) == normalize_answer(other) != ""


def test_scripts_without_spaces_are_compared_by_characters() -> None:
    assert contains("答案是红色阀门。", ["红色阀门"]) == 1
    assert contains("答えは赤いバルブです。", ["赤いバルブ"]) == 1
    assert contains("คำตอบคือวาล์วสีแดง", ["สีแดง"]) == 1
    assert contains("밸브는 빨간색입니다.", ["빨간색"]) == 1
    assert contains("压力是15巴", ["5巴"]) == contains("压力是1.5巴", ["5巴"]) == 0
    assert contains("कमला", ["कमल"]) == 0  # a script with spaces: whole words, marks belong to them
    # 2 characters shared of 4 predicted and 3 gold.
    assert f1("红色阀门", ["红色泵"]) == pytest.approx(2 * 2 / (4 + 3))


def test_a_bare_string_is_not_a_list_of_answers() -> None:
    for metric in (exact_match, f1, contains):
        with pytest.raises(TypeError, match="list of gold answers"):
            metric("7", "7")


@given(TEXTS, TEXTS)
def test_f1_is_bounded_and_symmetric(one: str, other: str) -> None:
    score = f1(one, [other])
    assert 0 <= score <= 1
    assert score == f1(other, [one])
    assert exact_match(one, [other]) == exact_match(other, [one])
    assert f1(one, [one]) == exact_match(one, [one]) == contains(one, [one]) == 1


@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_exact_match_implies_the_others_and_order_of_answers_is_irrelevant(prediction: str, answers: list[str]) -> None:
    assert exact_match(prediction, answers) <= min(f1(prediction, answers), contains(prediction, answers))
    for metric in (exact_match, f1, contains):
        assert metric(prediction, answers) == metric(prediction, answers[::-1])


@given(WORDS, WORDS)
def test_contains_against_a_slow_search(prediction: str, answer: str) -> None:
    words, gold = normalize_answer(prediction).split(), normalize_answer(answer).split()
    found = any(words[i : i + len(gold)] == gold for i in range(len(words)) if gold) or words == gold == []
    assert contains(prediction, [answer]) == found


def slow_interval(values: list[float], clusters: list[str], seed: int, resamples: int, level: float) -> Estimate:
    """The definition, one draw at a time."""
    groups: dict[str, list[float]] = {label: [] for label in sorted(set(clusters))}
    for value, label in zip(values, clusters):
        groups[label].append(value)
    drawable = list(groups.values()) if len(groups) > 1 else [[value] for value in values]
    stream = np.random.PCG64(seed)
    means = []
    for _ in range(resamples):
        sample: list[float] = []
        for _ in drawable:
            sample += drawable[int(stream.random_raw()) % len(drawable)]
        means.append(sum(sample) / len(sample))
    means.sort()

    def quantile(q: float) -> float:
        position = q * (resamples - 1)
        below = math.floor(position)
        above = min(below + 1, resamples - 1)
        return means[below] + (position - below) * (means[above] - means[below])

    mean = sum(values) / len(values)
    return Estimate(mean, quantile((1 - level) / 2), quantile((1 + level) / 2), len(values))


def assert_same(one: Estimate, other: Estimate) -> None:
    assert one.n == other.n
    assert (one.mean, one.low, one.high) == pytest.approx((other.mean, other.low, other.high), abs=1e-12)


def uneven(seed: int = 0, documents: int = 7) -> tuple[list[float], list[str]]:
    """Values in clusters of 1 to 5 questions."""
    rng = np.random.default_rng(seed)
    clusters = [f"d{i}" for i in range(documents) for _ in range(1 + i % 5)]
    return list(rng.normal(size=len(clusters))), clusters


@pytest.mark.parametrize(("seed", "resamples", "level"), [(0, 200, 0.95), (3, 101, 0.8), (0, 1, 0.5)])
def test_interval_equals_the_slow_loop(seed: int, resamples: int, level: float) -> None:
    values, clusters = uneven()
    assert_same(
        interval(values, clusters, seed, resamples, level), slow_interval(values, clusters, seed, resamples, level)
    )


def test_blocks_of_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values, clusters = uneven()
    monkeypatch.setattr(cas.evaluation.metrics, "_DRAWS_AT_ONCE", 20)
    assert_same(interval(values, clusters, 0, 99), slow_interval(values, clusters, 0, 99, 0.95))


def test_a_published_interval_stays_as_it_is() -> None:
    """Fixed figures: a numpy whose random stream changed, or a new formula, must not go unseen."""
    estimate = interval([0.1, 0.25, 0.4, 0.8, 0.05, 0.33, 0.71], list("aabcdde"), seed=5, resamples=10)
    assert_same(estimate, Estimate(mean=2.64 / 7, low=0.24845486111111112, high=0.59785, n=7))


def test_one_cluster_resamples_its_questions() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.5]
    estimate = interval(values, ["d"] * 6, resamples=300)
    assert_same(estimate, slow_interval(values, ["d"] * 6, 0, 300, 0.95))
    assert estimate.low < estimate.mean < estimate.high
    assert_same(interval([0.25], ["d"]), Estimate(0.25, 0.25, 0.25, 1))


def test_interval_depends_on_the_seed_and_not_on_the_order() -> None:
    values, clusters = uneven()
    estimate = interval(values, clusters)
    assert estimate == interval(values, clusters)
    assert_same(estimate, interval(values[::-1], clusters[::-1]))
    assert interval(values, clusters, seed=1) != estimate


def test_clustering_widens_the_interval_of_correlated_answers() -> None:
    """20 documents, 10 questions each with one common value: the width must grow by about sqrt(10) = 3.2."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=20), 10)
    clustered = interval(values, [f"d{i // 10}" for i in range(200)])
    independent = interval(values, [f"q{i}" for i in range(200)])
    ratio = (clustered.high - clustered.low) / (independent.high - independent.low)
    assert 2.5 < ratio < 4
    assert clustered.mean == independent.mean


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    """80 collections of 40 documents: the 90 % interval must hold the true mean 0 in 61 to 79 of them (3 sigma)."""
    covered = 0
    for trial in range(80):
        rng = np.random.default_rng(trial)
        values = np.repeat(rng.normal(size=40), 3) + rng.normal(size=120)
        estimate = interval(values, [f"d{i // 3}" for i in range(120)], resamples=400, level=0.9)
        covered += estimate.low <= 0 <= estimate.high
    assert 61 <= covered <= 79


def test_paired_difference_is_the_interval_of_the_differences() -> None:
    a, clusters = uneven(0)
    b, _ = uneven(1)
    difference = paired_difference(a, b, clusters, 2, 150, 0.9)
    assert_same(difference, slow_interval([x - y for x, y in zip(a, b)], clusters, 2, 150, 0.9))
    # What both arms find hard cancels out: a constant gain has no spread at all.
    assert_same(paired_difference([x + 0.5 for x in b], b, clusters), Estimate(0.5, 0.5, 0.5, len(b)))
    swapped = paired_difference(b, a, clusters, 2, 150, 0.9)
    assert_same(swapped, Estimate(-difference.mean, -difference.high, -difference.low, difference.n))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: interval([], []), UserError, "a value and a cluster"),
        (lambda: interval([1.0], ["a", "b"]), UserError, "2 clusters"),
        (lambda: interval([[1.0], [2.0]], ["a", "b"]), UserError, "a value and a cluster"),
        (lambda: interval([1.0, math.inf], ["a", "b"]), UserError, "value 1 is inf"),
        (lambda: interval([math.nan, 1.0], ["a", "b"]), UserError, "value 0 is nan"),
        (lambda: interval([1.0], ["a"], level=95), ConfigError, "level"),
        (lambda: interval([1.0], ["a"], resamples=0), ConfigError, "resamples"),
        (lambda: paired_difference([1.0], [1.0, 2.0], ["a"]), UserError, "same questions"),
    ],
)
def test_mistakes_are_named(call, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()


def test_importing_the_metrics_needs_no_torch() -> None:
    code = "import sys, cas.evaluation.metrics, cas.evaluation.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("prediction", "answers"),
    [
        ("The red valve.", ["red valve"]),
        ("a red valve, of the pump", ["red valve", "the pump's valve"]),
        ("U.S. Navy", ["the US navy"]),
        ("four", ["4"]),
        ("4-5 bar", ["five bar", "4-5 bars"]),
        ("The e-mail cost 1,000 dollars", ["an email", "1000 dollars"]),
        ("$5", ["5"]),
        ("valve valve red", ["red valve red"]),
    ],
)
def test_exact_match_and_f1_agree_with_torchmetrics(prediction: str, answers: list[str]) -> None:
    """SQuAD's own script as torchmetrics has it, in percent."""
    torchmetrics = pytest.importorskip("torchmetrics.functional.text")
    found = torchmetrics.squad(
        [{"id": "1", "prediction_text": prediction}],
        [{"id": "1", "answers": {"text": answers, "answer_start": [0] * len(answers)}}],
    )
    assert 100 * exact_match(prediction, answers) == pytest.approx(float(found["exact_match"]))
    assert 100 * f1(prediction, answers) == pytest.approx(float(found["f1"]), abs=1e-4)


def test_rouge_and_chrf_agree_with_torchmetrics() -> None:
    """The libraries we call (rouge-score, sacrebleu) against another's own: chrF2, and ROUGE-L of one answer."""
    from cas.evaluation.metrics import overlap_scores

    torchmetrics = pytest.importorskip("torchmetrics.functional.text")
    said, gold = "the crane lifts nine tonnes on mondays", "nine tonnes are lifted by the crane"
    found = overlap_scores(said, [gold, "zzz"])
    assert found["chrf"] == pytest.approx(float(torchmetrics.chrf_score([said], [[gold]], n_word_order=0)), abs=1e-3)
    assert found["rouge_l"] == pytest.approx(_rouge_l(said, gold), abs=1e-6)
    assert overlap_scores(gold, [gold]) == {"rouge_l": 1.0, "chrf": 1.0}


def _rouge_l(said: str, gold: str) -> float:
    """The longest common subsequence of words as F-measure; no word here changes when it is stemmed but by a plural."""
    a, b = ([w.rstrip("s").removesuffix("ed") for w in text.split()] for text in (said, gold))
    longest = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            longest[i + 1, j + 1] = longest[i, j] + 1 if x == y else max(longest[i, j + 1], longest[i + 1, j])
    common = int(longest[-1, -1])
    return 2 * (common / len(a)) * (common / len(b)) / (common / len(a) + common / len(b))
