"""Answer metrics, their bootstrap intervals and permutation tests.

Answer metrics follow SQuAD (case, punctuation and articles are ignored, the best gold answer counts), extended to all
scripts and to the marks that change a value, see :func:`normalize_answer`; each is a float from 0 to 1. The
log-perplexity of the gold answer is measured by the model code and is one more float per question here.

Intervals come from the percentile bootstrap (Efron & Tibshirani, *An Introduction to the Bootstrap*, 1993, ch. 13) over
clusters: questions about one document share its cartridge, so they are not independent, and whole documents are
resampled, never single questions. With S_c the sum of the values and N_c the number of questions of document c, and
c_1 ... c_C drawn with replacement from the C documents, one resample has the mean

    (S_c1 + ... + S_cC) / (N_c1 + ... + N_cC)

and the interval runs between the (1 - level)/2 and (1 + level)/2 quantiles of these means.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import regex

from cas.errors import ConfigError, UserError
from retrieval.bm25 import UNSPACED, ascii_digits

METRICS = ("contains", "f1", "exact_match", "log_perplexity")  # of every recorded answer
_DASHES = "\u2010\u2011\u2012\u2013\u2212"  # hyphens, figure and en dash, minus
_FOLD = str.maketrans(dict.fromkeys(_DASHES, "-") | dict.fromkeys("‘’ʼ´`", "'") | {"٪": "%"})
# What is rewritten, in this order, before punctuation is dropped. `\p{Nd}` digits are ASCII by then.
_REWRITES = [
    (regex.compile(pattern, regex.V1), replacement)
    for pattern, replacement in (
        (r"\p{Cf}", ""),  # soft hyphens, marks of direction, joiners
        (r"(?<=(?<!\d)\d{1,3}(?:,\d{3})*),(?=\d{3}(?!\d))", ""),  # 1,000 is 1000
        (r"(?<=\d)\p{Pd}(?=\d)", "-"),
        (r"(?<=\d)\s*%|\bper cent\b", " percent "),
        (r"[<>]=", lambda match: "≤≥"["<>".index(match[0][0])]),
        (r"(?<![-=\w])[<>≤≥](?=\s*[-\p{Sc}.]*\d)", r" \g<0> "),
        (r"(?<=\d)(?=°)|(?<=[\p{Sc}--[$]])(?=\d)|(?<=\d)(?=[\p{Sc}--[$]])", " "),  # 5°C is 5 °C; €5 is € 5
        (rf"{UNSPACED}\p{{M}}*", r" \g<0> "),  # one token per character
    )
]
_LETTER = r"[\p{L}\p{M}\p{N}]"
# Punctuation that is kept; other ASCII is dropped without a trace (as in SQuAD: "U.S." is "us"), the rest as a space.
_PUNCTUATION = regex.compile(
    rf"""(?P<kept> (?<=\d)[^\w\s]+(?=\d)            # inside numbers: 1.5, 3/4, 12:30, 4-5, 10^6
                 | (?<![\w)\]])-(?=\p{{Sc}}?\.?\d)  # a sign: -5
                 | (?<!\S)\.(?=\d)                  # .5
                 | (?<={_LETTER}[+\#]*)[+\#]        # C++, C#, A+
                 | (?<={_LETTER})[/_@=^](?={_LETTER})  # m/s, max_connections
                 | (?<=\s)[<>](?=\s) )
       | (?P<dropped> [!-/:-@\[-`{{-~] )
       | \p{{P}}""",
    regex.VERBOSE | regex.V1,
)
_ARTICLES = {"a", "an", "the"}
_DRAWS_AT_ONCE = 1 << 20  # keeps the bootstrap within some 30 MB for up to a million documents


def normalize_answer(text: str) -> str:
    """Fold case, compatibility forms (NFKC), digits and dashes; drop punctuation, then a/an/the.

    Tokens are joined with single spaces. As SQuAD for ordinary English, quirks included: ``"U.S."`` becomes ``"us"``
    and the lone letter ``"A"`` becomes ``""``, so a multiple-choice question needs the text of its option as gold
    answer, not the letter. What changes a value is kept: marks inside numbers (1.5, 3/4, 4-5; but 1,000 is 1000), the
    minus sign, percent, ``<`` and ``>`` before numbers, ``C++``, ``C#``, ``m/s``. Characters of scripts that put no
    spaces between words, and Korean syllables (particles are attached to words), are tokens of their own.
    """
    text = regex.sub(r"(?<=\d)[¼-¾⅐-⅞]", r" \g<0>", text)  # NFKC would make 51/2 of 5½ and 106 of 10⁶
    text = regex.sub(r"(?<=\d)(?=[⁻⁰¹²³⁴-⁹])", "^", text) if regex.search(r"\d[⁻⁰¹²³⁴-⁹]", text) else text
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.translate(_FOLD)).casefold())
    text = ascii_digits(text.translate(_FOLD).replace("⁄", "/"))  # NFKC gives new dashes and quotes
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _PUNCTUATION.sub(lambda match: match["kept"] or ("" if match["dropped"] else " "), text)
    return " ".join(word for word in text.split() if word not in _ARTICLES)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the normalized prediction equals a normalized gold answer, else 0.0.

    Without a gold answer (the question has none), 1.0 for a prediction that normalizes to nothing, as in SQuAD 2.0.
    """
    return _best(lambda predicted, gold: float(predicted == gold), prediction, answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of token precision and recall (repeated tokens count), 0 to 1, best over the gold answers.

    A token is a word, or a character of a script without spaces (:func:`normalize_answer`).

    When either side is empty, 1.0 if both are and else 0.0, as in SQuAD 2.0.
    """
    return _best(_word_f1, prediction, answers)


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the words of a normalized gold answer occur in a row in the normalized prediction, else 0.0.

    Whole words: ``"7"`` is not in ``"17 bar"``; whole characters in scripts without spaces. Without a gold answer, 1.0
    for an empty prediction only.
    """
    # Words have one space between them, so an empty gold answer (two spaces) is found in an empty prediction only.
    return _best(lambda predicted, gold: float(f" {gold} " in f" {predicted} "), prediction, answers)


def overlap_scores(text: str, answers: Sequence[str]) -> dict[str, float]:
    """``rouge_l`` (F-measure, stemmed; rouge-score) and ``chrf`` (chrF2; sacrebleu), best over the gold answers.

    Both are from 0 to 1. For answers that are sentences, where exact match is always 0.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

    rouge = RougeScorer(["rougeL"], use_stemmer=True).score_multi(list(answers), text)["rougeL"].fmeasure
    chrf = max(CHRF().sentence_score(text, [answer]).score for answer in answers)
    return {"rouge_l": float(rouge), "chrf": min(1.0, chrf / 100)}


def score_answer(metric: str, text: str, answers: Sequence[str]) -> float:
    """An answer's score from 0 to 1 under a metric of its text: exact_match, contains, f1, rouge_l or chrf."""
    own = {"exact_match": exact_match, "contains": contains, "f1": f1}
    return own[metric](text, answers) if metric in own else overlap_scores(text, answers)[metric]


def _word_f1(predicted: str, gold: str) -> float:
    predicted_words, gold_words = predicted.split(), gold.split()
    if not predicted_words or not gold_words:
        return float(predicted_words == gold_words)
    shared = (Counter(predicted_words) & Counter(gold_words)).total()
    return 2 * shared / (len(predicted_words) + len(gold_words))


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """Highest score over the gold answers; those that normalize to nothing count only when there is no other."""
    if isinstance(answers, str):
        raise TypeError("answers is one string: give a list of gold answers")
    golds = [gold for gold in map(normalize_answer, answers) if gold] or [""]
    predicted = normalize_answer(prediction)
    return max(score(predicted, gold) for gold in golds)


@dataclass(frozen=True)
class Estimate:
    """The mean of ``n`` values and the bounds of its interval, in the unit of the values."""

    mean: float
    low: float
    high: float
    n: int


def interval(
    values: npt.ArrayLike, clusters: Sequence[str], seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Estimate:
    """Mean of ``values`` and its percentile bootstrap interval over clusters (formula at the top of this file).

    ``values``: (n,) finite floats, one per question. ``clusters``: n labels, the document that each question is about.
    The same values give the same bounds in any order of the questions (up to rounding) and with any numpy release.
    With a single cluster only its questions can be resampled: the interval then covers other questions about that
    document, not other documents.

    Raises UserError when the values are empty, not finite or not as many as the clusters; ConfigError for a seed,
    number of resamples or level out of range.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0 or numbers.size != len(clusters):
        raise UserError(f"need a value and a cluster per question: {numbers.shape} values, {len(clusters)} clusters")
    broken = np.flatnonzero(~np.isfinite(numbers))
    if broken.size:
        raise UserError(f"value {broken[0]} is {numbers[broken[0]]}: only finite values have a mean")
    if resamples < 1 or seed < 0 or not 0 < level < 1:
        raise ConfigError(f"need resamples >= 1, seed >= 0, 0 < level < 1: {resamples=}, {seed=}, {level=}")

    place = {label: i for i, label in enumerate(sorted(set(clusters)))}
    if len(place) > 1:
        members = np.array([place[label] for label in clusters])
    else:
        members = np.arange(numbers.size)
    means = _resampled_means(np.bincount(members, weights=numbers), np.bincount(members), seed, resamples)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(numbers.mean()), float(low), float(high), int(numbers.size))


def percentile(values: npt.ArrayLike, share: float, seed: int = 0, resamples: int = 2000) -> Estimate:
    """A percentile of ``values`` (``share`` 0.95: the one that 95 % do not exceed) in ``mean``, and its 95 % percentile
    bootstrap interval over the values."""
    numbers = np.asarray(values, dtype=np.float64)
    drawn = np.random.Generator(np.random.PCG64(seed)).integers(len(numbers), size=(resamples, len(numbers)))
    low, high = np.quantile(np.quantile(numbers[drawn], share, axis=1), [0.025, 0.975])
    return Estimate(float(np.quantile(numbers, share)), float(low), float(high), len(numbers))


def paired_difference(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    clusters: Sequence[str],
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Estimate:
    """:func:`interval` of ``a - b``: (n,) values each, two arms on the same questions in the same order."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise UserError(f"a pair needs both arms on the same questions: {first.shape} and {second.shape} values")
    return interval(first - second, clusters, seed, resamples, level)


def sign_flip(a: npt.ArrayLike, b: npt.ArrayLike, clusters: Sequence[str], seed: int = 0, flips: int = 10_000) -> float:
    """Two-sided p-value of "a and b do not differ": (n,) values each, two arms on the same questions.

    Under that hypothesis all differences of a document may flip their sign together. The p-value is the share of
    ``flips`` random flips under which the sum is at least as far from 0 as the observed one, which counts as a flip
    itself (a paired permutation test; Good, *Permutation Tests*, 2000, ch. 3). With few documents it cannot be small:
    for five, at least 2 / 2**5. Raises UserError for arms of unequal length.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.size != len(clusters) or not first.size:
        raise UserError(f"a pair needs both arms on the same questions: {first.shape} and {second.shape} values")
    place = {label: i for i, label in enumerate(sorted(set(clusters)))}
    sums = np.bincount([place[label] for label in clusters], weights=first - second)
    bits = np.random.PCG64(seed).random_raw(flips * len(sums)).reshape(flips, len(sums)) >> np.uint64(63)
    flipped = (2.0 * bits - 1.0) @ sums
    extreme = np.abs(flipped) >= abs(sums.sum()) - 1e-9
    return float((1 + extreme.sum()) / (1 + flips))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, in the given order (Holm, 1979): the i-th smallest of m is multiplied by
    m - i + 1, is never below the one before it, and is at most 1."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = highest
    return corrected


def _resampled_means(
    sums: npt.NDArray[np.number], counts: npt.NDArray[np.number], seed: int, resamples: int
) -> npt.NDArray[np.float64]:
    """(resamples,) means, each of as many clusters drawn with replacement as there are; sums and counts per cluster."""
    # Numpy promises that a bit generator's raw stream stays as it is, but not Generator.integers, and a published
    # interval must be reproducible years later. The remainder's bias is below clusters / 2**64.
    stream = np.random.PCG64(seed)
    size = len(sums)
    rows = max(1, _DRAWS_AT_ONCE // size)
    means = np.empty(resamples)
    for start in range(0, resamples, rows):
        block = means[start : start + rows]
        drawn = (stream.random_raw(block.size * size) % size).astype(np.intp).reshape(block.size, size)
        block[:] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return means
