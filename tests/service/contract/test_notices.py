"""Warnings: sentences for people that know their code and values."""

import copy
import json
import pickle

import pytest

from service.contract.notices import Notice, as_rows

FEW = "task 'cars' has only 24 labeled samples; with fewer than 100, intervals are rough"


def few() -> Notice:
    return Notice("few_samples", task="cars", count=24, enough=100)


def test_a_notice_is_its_sentence() -> None:
    assert few() == FEW
    assert json.dumps([few()]) == json.dumps([FEW])


def test_a_notice_keeps_its_code_and_values_as_json() -> None:
    expected = {"code": "few_samples", "values": {"task": "cars", "count": 24, "enough": 100}, "detail": FEW}
    assert json.loads(json.dumps(as_rows([few()]))) == [expected]


def test_a_sentence_without_a_code_is_kept_as_it_is() -> None:
    assert as_rows(["careful"]) == [{"code": None, "values": {}, "detail": "careful"}]


@pytest.mark.parametrize("copied", [copy.deepcopy(few()), pickle.loads(pickle.dumps(few()))])  # our own
def test_a_copy_says_the_same(copied: Notice) -> None:
    assert (copied, copied.code, copied.values) == (few(), few().code, few().values)


def test_a_notice_that_nobody_wrote_a_sentence_for_is_an_error() -> None:
    with pytest.raises(KeyError):
        Notice("no_such_notice")
    with pytest.raises(KeyError):
        Notice("few_samples", task="cars")
