"""Metrics of text, by kind: small cases worked out by hand, and what the libraries say themselves."""

import math
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics.chrf import CHRF
from sklearn.metrics import top_k_accuracy_score
from torchmetrics.functional.text.rouge import rouge_score

from workers.metrics import KINDS
from workers.metrics.language_modeling import perplexity, token_losses
from workers.metrics.multiple_choice import right_choices, share
from workers.metrics.retrieval import ranks, recall_at_1, recall_at_5, recall_at_10
from workers.metrics.sequence_to_sequence import chrf, chrf_counts, exact_matches, mean, rouge_l
from workers.metrics.token_classification import entities, entity_counts, entity_f1

# The README of seqeval, whose report says: MISC 0 of 1, PER 1 of 1; micro F1 0.50.
RIGHT = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
FOUND = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
        ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("I-PER I-PER O", {("PER", 0, 2)}),  # IOB1, where B- only stands between neighbors
        ("I-PER B-PER I-LOC", {("PER", 0, 1), ("PER", 1, 2), ("LOC", 2, 3)}),
        ("B-PER I-LOC I-LOC", {("PER", 0, 1), ("LOC", 1, 3)}),
        ("O I-PER", {("PER", 1, 2)}),
        ("B-PER E-PER S-LOC O", {("PER", 0, 2), ("LOC", 2, 3)}),
        ("B-PER I-PER L-PER U-PER I-PER", {("PER", 0, 3), ("PER", 3, 4), ("PER", 4, 5)}),
        ("NOUN NOUN O X-Y", {("NOUN", 0, 1), ("NOUN", 1, 2), ("X-Y", 3, 4)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_entities_of_a_row_of_tags(tags: str, found: set[Any]) -> None:
    assert entities(tags.split()) == found


def test_entity_f1_counts_whole_entities() -> None:
    counts = entity_counts(FOUND, RIGHT)
    assert counts.tolist() == [[0, 1, 1], [1, 0, 0]]
    assert entity_f1(counts) == pytest.approx(0.5)
    assert entity_f1(counts[[1, 1, 0]]) == pytest.approx(2 / 3)
    assert entity_f1(counts[[0]]) == 0
    assert entity_f1(np.zeros((2, 3), np.int64)) == 0


def test_perplexity_is_that_of_tokens_not_of_samples() -> None:
    losses = np.array([[9.0, math.log(2), math.log(8)], [9.0, math.log(4), 9.0]])
    labels = np.array([[5, 6, 7], [5, 6, -100]])
    sums = token_losses(losses, labels)
    np.testing.assert_allclose(sums, [[math.log(16), 2], [math.log(4), 1]])
    assert perplexity(sums) == pytest.approx(4)
    assert perplexity(sums[[1]]) == pytest.approx(4)
    assert labels[0, 0] == 5  # what was given is as it was


def test_perplexity_beyond_numbers() -> None:
    assert perplexity(np.array([[1e6, 1.0]])) == math.inf
    assert math.isnan(perplexity(np.array([[0.0, 0.0]])))


def test_choices_that_tie_are_no_answer() -> None:
    scores = np.array([[-1.0, -2.0, -math.inf], [-2.0, -1.0, -3.0], [-1.0, -1.0, -2.0]])
    right = right_choices(scores, np.array([0, 0, 0]))
    assert right.tolist() == [True, False, False]
    assert share(right) == pytest.approx(1 / 3)


WRITTEN = ["My name is John", "The cat is on the mat.", "", "same", "a  b"]
WANTED = ["Is your name John", "There is a cat on the mat", "nothing", " same\n", "a b"]


def test_rouge_is_the_librarys() -> None:
    values = rouge_l(WRITTEN, WANTED)
    assert values[0] == pytest.approx(0.5)  # the library's own example
    pairs = zip(WRITTEN, WANTED, strict=True)
    expected = [float(rouge_score(a, b, rouge_keys="rougeL")["rougeL_fmeasure"]) for a, b in pairs]
    np.testing.assert_allclose(values, expected)
    assert mean(values) == pytest.approx(np.mean(expected))


def test_rouge_of_scripts_without_spaces_counts_characters() -> None:
    values = rouge_l(["猫が寝る", "青い空 sky"], ["猫は寝る", "青い海 Sky!"])
    np.testing.assert_allclose(values, [3 / 4, 3 / 4])


def test_exact_match_ignores_space_at_the_ends_only() -> None:
    assert exact_matches(WRITTEN, WANTED).tolist() == [False, False, False, True, False]


def test_chrf_of_counts_is_that_of_the_texts() -> None:
    counts = chrf_counts(WRITTEN, WANTED)
    assert counts.shape == (5, 18)
    assert chrf(counts) == pytest.approx(CHRF().corpus_score(WRITTEN, [WANTED]).score)
    assert chrf(counts[[1, 1, 3]]) == pytest.approx(
        CHRF().corpus_score([WRITTEN[k] for k in (1, 1, 3)], [[WANTED[k] for k in (1, 1, 3)]]).score
    )
    assert chrf(counts[[2]]) == 0


def test_chrf_by_hand() -> None:
    """Of "ab" and "abc": 1-grams 2 of 2 and 3, 2-grams 1 of 1 and 2; the text has no 3-grams, so these do not count."""
    counts = chrf_counts(["ab"], ["abc"])
    assert counts[0, :9].tolist() == [2, 3, 2, 1, 2, 1, 0, 1, 0]
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert chrf(counts) == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))


def test_ranks_put_ties_last() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.2, 0.1], [0.0, 0.3, 0.4]], np.float32)
    assert ranks(scores, np.array([0, 0, 0])).tolist() == [1, 2, 3]


def test_recall_is_scikit_learns() -> None:
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(200, 40)).astype(np.float32)
    labels = generator.integers(0, 40, 200)
    scores[np.arange(200), labels] += 1
    found = ranks(scores, labels)
    for k, recall in ((1, recall_at_1), (5, recall_at_5), (10, recall_at_10)):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=np.arange(40))
        assert recall(found) == pytest.approx(expected)
        assert 0 < recall(found) < 1


ANSWERS: dict[str, tuple[Any, Any]] = {
    "entity_f1": (FOUND * 3, RIGHT * 3),
    "perplexity": (np.arange(12.0).reshape(3, 4), np.ones((3, 4), np.int64)),
    "rouge_l": (WRITTEN, WANTED),
    "exact_match": (WRITTEN, WANTED),
    "chrf": (WRITTEN, WANTED),
    "recall_at_1": (np.array([1, 2, 7, 20]), np.zeros(4, np.int64)),
    "recall_at_5": (np.array([1, 2, 7, 20]), np.zeros(4, np.int64)),
    "recall_at_10": (np.array([1, 2, 7, 20]), np.zeros(4, np.int64)),
}


@pytest.mark.parametrize("metric", ANSWERS)
def test_many_choices_of_rows_are_each_one_figure(metric: str) -> None:
    (measure,) = [row.measures[known] for row in KINDS.values() for known in row.measures if known == metric]
    contributions = measure.contributions(*ANSWERS[metric])
    rows = np.random.default_rng(1).integers(0, len(contributions), (20, len(contributions)))
    expected = [measure.figure(contributions[chosen]) for chosen in rows]
    np.testing.assert_allclose(measure.figures(contributions, rows), expected)
    assert len(set(expected)) > 1
