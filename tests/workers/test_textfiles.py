"""Text becomes the tensors that a model takes, by its own tokenizer; what does not fit is named by line and column."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from service.contract.errors import BadInput
from service.contract.evaluation import TaskEvaluation
from tests.workers.tiny_tokenizers import VOCABULARY, bert_like, byte_level, files, plain
from workers.textfiles import Tokenized, joined, load_tokenizer, pad, read_text

CONFIG: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
}
CLASSES = {"id2label": {"0": "bad", "1": "good"}}
TAGS = {"id2label": {"0": "O", "1": "B-PER", "2": "I-PER"}}
LLAMA = {**CONFIG, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
T5 = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": len(VOCABULARY),
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
}
ADDRESS = "file:///samples.jsonl"


def bert(head: str, **values: Any) -> dict[str, Any]:
    return {**CONFIG, "model_type": "bert", "architectures": [f"Bert{head}"], **values}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("pieces")
    bert_like(folder)
    return load_tokenizer(files(folder))


@pytest.fixture
def words(tmp_path: Path) -> Any:
    plain(tmp_path / "words")
    return load_tokenizer(files(tmp_path / "words"))


def read(kind: str, tokenizer: Any, config: dict[str, Any], *rows: Any, **asked: Any) -> Tokenized:
    data = "\n".join(json.dumps(row) for row in rows).encode()
    row = TaskEvaluation.model_validate({"task": "t", "kind": kind, "labeled": ADDRESS, **asked})
    return read_text(data, ADDRESS, row, tokenizer, config)


def ids(*texts: str) -> list[list[int]]:
    rows = [[VOCABULARY[word] for word in text.split()] for text in texts]
    return pad(rows, 0).tolist()


def test_classes_by_name_or_number(pieces: Any) -> None:
    rows = [{"text": "Good film", "label": "good"}, {"text": "bad", "label": 0}, {"text": "cats", "label": "1"}]
    found = read("classification", pieces, bert("ForSequenceClassification", **CLASSES), *rows).tensors
    assert found["labels"].tolist() == [1, 0, 1]
    assert found["input_ids"].tolist() == ids("[CLS] good film [SEP]", "[CLS] bad [SEP]", "[CLS] cat ##s [SEP]")
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert set(found) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_a_second_text_stands_beside_the_first(pieces: Any) -> None:
    found = read(
        "regression",
        pieces,
        bert("ForSequenceClassification", id2label={"0": "LABEL_0"}),
        {"text": "the cat", "other": "dogs", "label": -0.5},
        columns={"pair": "other"},
    ).tensors
    assert found["input_ids"].tolist() == ids("[CLS] the cat [SEP] dogs [SEP]")
    assert found["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]
    assert found["labels"].tolist() == [-0.5]


def test_what_a_model_does_not_take_is_left_out(pieces: Any) -> None:
    config = {
        "model_type": "distilbert",
        "architectures": ["DistilBertForSequenceClassification"],
        "vocab_size": len(VOCABULARY),
        "dim": 16,
        "n_layers": 1,
        "n_heads": 2,
        "hidden_dim": 32,
        **CLASSES,
    }
    found = read("classification", pieces, config, {"text": "good", "label": 1})
    assert set(found.tensors) == {"input_ids", "attention_mask", "labels"}


def test_the_first_piece_of_a_word_has_its_tag(pieces: Any) -> None:
    rows = [{"text": ["Anna", "cats", "sat"], "label": ["B-PER", "I-PER", "O"]}, {"text": "bob bob", "label": [1, 2]}]
    found = read("token_classification", pieces, bert("ForTokenClassification", **TAGS), *rows)
    assert found.tensors["input_ids"].tolist() == ids("[CLS] anna cat ##s sat [SEP]", "[CLS] bob bob [SEP]")
    assert found.tensors["labels"].tolist() == [[-100, 1, 2, -100, 0, -100], [-100, 1, 2, -100, -100, -100]]
    assert found.warnings == ()


def test_words_are_read_as_in_a_text(tmp_path: Path) -> None:
    byte_level(tmp_path)
    tokenizer = load_tokenizer(files(tmp_path))
    config = {**bert("ForTokenClassification", **TAGS), "vocab_size": 300}
    found = read("token_classification", tokenizer, config, {"text": ["a", "cat", "ac"], "label": [0, 1, 2]}).tensors
    assert tokenizer.convert_ids_to_tokens(found["input_ids"][0]) == ["<s>", "a", "Ġcat", "Ġa", "c", "</s>"]
    assert found["labels"].tolist() == [[-100, 0, 1, 2, -100, -100]]


def test_what_is_too_long_is_cut_and_counted(pieces: Any) -> None:
    rows = [{"text": ["bob"] * 30, "label": ["O"] * 30}, {"text": ["bob"], "label": ["O"]}]
    found = read("token_classification", pieces, bert("ForTokenClassification", **TAGS), *rows)
    assert found.tensors["input_ids"].shape == (2, 20)
    assert found.warnings == (
        f"{ADDRESS}: 1 of 2 texts are longer than the 20 tokens that fit, and were cut.",
        f"{ADDRESS}: 12 of 31 words are not measured: they were cut, or have no token.",
    )


def test_every_token_of_a_text_counts(words: Any) -> None:
    found = read("language_modeling", words, LLAMA, {"text": "the cat sat"}, {"text": "dogs"}).tensors
    assert found["input_ids"].tolist() == ids("[CLS] the cat sat", "[CLS] dogs")
    assert found["labels"].tolist() == [[2, *ids("the cat sat")[0]], [2, VOCABULARY["dogs"], -100, -100]]


def test_only_what_follows_counts_where_there_is_a_second_text(words: Any) -> None:
    found = read(
        "language_modeling", words, LLAMA, {"text": "the cat", "answer": "sat on"}, columns={"pair": "answer"}
    ).tensors
    assert found["input_ids"].tolist() == ids("[CLS] the cat sat on")
    assert found["labels"].tolist() == [[-100, -100, -100, *ids("sat on")[0]]]


def test_choices_follow_their_question(words: Any) -> None:
    rows = [
        {"text": "the sky is", "choices": ["red", "blue sky", "bad"], "label": "blue sky"},
        {"text": "dogs", "choices": ["bark", "sat"], "label": 0},
    ]
    found = read("multiple_choice", words, LLAMA, *rows).tensors
    assert found["labels"].tolist() == [1, 0]
    assert found["input_ids"].shape == found["scored"].shape == (2, 3, 6)
    assert found["input_ids"][0].tolist() == ids(
        "[CLS] the sky is red", "[CLS] the sky is blue sky", "[CLS] the sky is bad"
    )
    assert found["scored"].sum(-1).tolist() == [[1, 2, 1], [1, 1, 0]]
    assert [int(row.nonzero()[0]) for row in found["scored"][0]] == [4, 4, 4]


def test_choices_of_a_model_with_a_head_for_them(pieces: Any) -> None:
    rows = [{"text": "the sky is", "choices": ["red", "blue"], "label": 1}]
    found = read("multiple_choice", pieces, bert("ForMultipleChoice"), *rows).tensors
    assert set(found) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert found["input_ids"][0].tolist() == ids(
        "[CLS] the sky is [SEP] red [SEP]", "[CLS] the sky is [SEP] blue [SEP]"
    )
    rows.append({"text": "dogs", "choices": ["bark", "sat", "no"], "label": 1})
    with pytest.raises(BadInput, match="line 1: there are 2 choices, but 3 in another row"):
        read("multiple_choice", pieces, bert("ForMultipleChoice"), *rows)


def test_prompts_of_a_causal_model_are_padded_at_their_start(words: Any) -> None:
    rows = [{"text": "the sky is", "label": "blue"}, {"text": "the color the sky is", "label": "red and blue"}]
    found = read("sequence_to_sequence", words, LLAMA, *rows, max_new_tokens=2)
    assert found.tensors["input_ids"].tolist() == ids("[PAD] [PAD] [CLS] the sky is", "[CLS] the color the sky is")
    assert found.tensors["attention_mask"].sum(1).tolist() == [4, 6]
    assert found.tensors["labels"].tolist() == [[VOCABULARY["blue"], -100, -100], *ids("red and blue")]
    assert found.warnings == (
        f"{ADDRESS}: 1 of 2 right texts are longer than the 2 tokens that are written at most; raise max_new_tokens.",
    )


def test_a_prompt_leaves_room_for_what_is_written_and_loses_its_start(words: Any) -> None:
    rows = [{"text": "the " * 18 + "cat", "label": "sat"}]
    found = read("sequence_to_sequence", words, LLAMA, *rows, max_new_tokens=15)
    assert found.tensors["input_ids"].tolist() == ids("[CLS] the the the cat")
    assert "longer than the 5 tokens that fit" in found.warnings[0]


def test_what_an_encoder_reads_is_padded_at_its_end(tmp_path: Path) -> None:
    plain(tmp_path, end=True)
    rows = [{"text": "the sky", "label": "blue"}, {"text": "cat", "label": "a cat"}]
    found = read("sequence_to_sequence", load_tokenizer(files(tmp_path)), T5, *rows).tensors
    assert found["input_ids"].tolist() == ids("the sky [SEP]", "cat [SEP]")
    assert found["labels"].tolist() == [[VOCABULARY["blue"], -100], *ids("a cat")]


def test_equal_documents_are_one(pieces: Any) -> None:
    rows = [
        {"text": "what color is the sky", "pair": "the sky is blue"},
        {"text": None, "pair": "dogs bark"},
        {"text": "sky ?", "pair": "the sky is blue"},
        {"text": "dogs ?", "pair": "dogs bark"},
    ]
    found = read("retrieval", pieces, bert("Model"), *rows).tensors
    assert found["labels"].tolist() == [0, 0, 1]
    assert len(found["query.input_ids"]) == 3
    assert found["document.input_ids"].tolist() == ids("[CLS] the sky is blue [SEP]", "[CLS] dogs bark [SEP]")


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (
            "joy",
            r"line 2: column 'label' has .joy., which is no class .* its config.json has 0 to 1 \(bad, good\)",
        ),
        (2, "line 2: column 'label' has 2, which is no class"),
        ("-1", "line 2: column 'label' has .-1., which is no class"),
    ],
)
def test_labels_that_the_checkpoint_does_not_have(pieces: Any, label: Any, words: str) -> None:
    rows = [{"text": "good", "label": 1}, {"text": "good", "label": label}]
    with pytest.raises(BadInput, match=words):
        read("classification", pieces, bert("ForSequenceClassification", **CLASSES), *rows)


def test_names_that_two_classes_share(pieces: Any) -> None:
    config = bert("ForSequenceClassification", id2label={"0": "good", "1": "good"})
    with pytest.raises(BadInput, match="two classes have the same name"):
        read("classification", pieces, config, {"text": "good", "label": "good"})


def test_a_head_of_features_knows_numbers_only(pieces: Any) -> None:
    head = {"weight": "file:///head.safetensors"}
    found = read("classification", pieces, bert("Model"), {"text": "good", "label": 7}, head=head)
    assert found.tensors["labels"].tolist() == [7]
    with pytest.raises(BadInput, match="but classes have numbers only, from 0"):
        read("classification", pieces, bert("Model"), {"text": "good", "label": "good"}, head=head)


def test_the_file_is_named_before_its_line(pieces: Any) -> None:
    with pytest.raises(BadInput, match=rf"^{ADDRESS}, line 1: there is no column 'label'"):
        read("classification", pieces, bert("ForSequenceClassification", **CLASSES), {"text": "good"})


def test_files_that_make_no_tokenizer() -> None:
    for given in ({"tokenizer.json": b"{}"}, {"tokenizer.json": b"\xff"}, {"spiece.model": b""}):
        with pytest.raises(BadInput, match=r"make no tokenizer"):
            load_tokenizer(given)
    for given in ({}, {"config.json": b"{}"}):
        with pytest.raises(BadInput, match=r"text needs a tokenizer.json or a vocabulary"):
            load_tokenizer(given)
    with pytest.raises(BadInput, match=r"tokenizer_config.json is no JSON object"):
        load_tokenizer({"tokenizer.json": b"{}", "tokenizer_config.json": b"[]"})


def test_a_tokenizer_names_no_files_elsewhere(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text("\n".join([*VOCABULARY, "secret"]))
    config = json.dumps({"tokenizer_class": "BertTokenizer", "vocab": str(elsewhere)}).encode()
    found = load_tokenizer({"tokenizer_config.json": config, "vocab.txt": "\n".join(VOCABULARY).encode()})
    assert "secret" not in found.get_vocab()


def test_a_tokenizer_runs_no_code_of_its_checkpoint(tmp_path: Path) -> None:
    plain(tmp_path)
    given = files(tmp_path)
    given["tokenizer_config.json"] = json.dumps(
        {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "mine.Mine"]}}
    ).encode()
    given["mine.py"] = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    with contextlib.suppress(BadInput):
        load_tokenizer(given)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "more", "both"),
    [
        ("a", "b", "a b"),
        ("a ", "b", "a b"),
        ("a", "\nb", "a\nb"),
        ("色は", "青", "色は青"),
        ("色は", "blue", "色はblue"),
    ],
)
def test_a_space_goes_where_there_is_none(text: str, more: str, both: str) -> None:
    assert joined(text, more) == both


def test_rows_are_filled_up() -> None:
    assert pad([[1], [2, 3]], 9).tolist() == [[1, 9], [2, 3]]
    assert pad([[1], [2, 3]], 9, at_start=True).tolist() == [[9, 1], [2, 3]]
    assert pad([[], [1]], 9, at_start=True).tolist() == [[9], [1]]
    assert pad([[1]], 0).dtype is torch.int64
