"""Text files in, scores out: whole jobs over tiny models of each kind, beside what transformers alone makes of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from service.contract.errors import BadInput
from service.contract.recipe import Recipe
from service.contract.stages import Stage
from tests.workers import tiny_tokenizers
from tests.workers.architectures import Case
from tests.workers.stage_runs import Run, family
from tests.workers.tiny_models import TEXT, tokens
from tests.workers.tiny_tokenizers import VOCABULARY
from workers.metrics.sequence_to_sequence import chrf, chrf_counts
from workers.metrics.token_classification import entity_counts, entity_f1

WORDS: dict[str, Any] = {**TEXT, "vocab_size": len(VOCABULARY)}
TAGS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC"}
SENTENCES = (
    "anna lives in paris",
    "the cat sat on a mat .",
    "bob works at acme corp",
    "what color is the sky ?",
    "dogs bark",
    "anna and bob sat in the red sky",
)
Rows = Sequence[dict[str, Any]]


def inputs() -> dict[str, Tensor]:
    return {name: values.clamp(max=len(VOCABULARY) - 1) for name, values in tokens().items()}


def prepare(folder: Path, architecture: str, case: Case, *, end: bool | None = None) -> dict[str, Any]:
    """A base and two experts with a tokenizer beside each; word pieces, or with ``end`` whole words."""
    recipe = family(folder, architecture, case)
    for name in ("base", "task1", "task2"):
        if end is None:
            tiny_tokenizers.bert_like(folder / name)
        else:
            tiny_tokenizers.plain(folder / name, end=end)
    return recipe


def finished(folder: Path, recipe: dict[str, Any], kind: str, rows: Rows, **asked: Any) -> Run:
    """The whole job, with one task measured on a JSONL file of these rows."""
    (folder / "test.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    row = {"task": "task1", "kind": kind, "labeled": f"file://{folder}/test.jsonl", **asked}
    recipe["evaluation"] = {"tasks": [row], "resamples": 100, "batch_size": 4}
    run = Run(folder, Recipe.model_validate(recipe))
    run.finish()
    return run


def scores(run: Run) -> dict[str, Any]:
    report = json.loads((run.folder / "result/merge/report.json").read_text())
    return dict(report["metrics"]["tasks"]["task1"])


def tokenizer_of(run: Run | Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained((run.folder if isinstance(run, Run) else run) / "task1")


def merged_model(run: Run, architecture: str) -> Any:
    model = getattr(transformers, architecture).from_pretrained(run.folder / "task1")
    model.load_state_dict(run.merged(), strict=False)
    return model.requires_grad_(False)


def tags_of(model: Any, tokenizer: Any, words: list[str]) -> list[str]:
    encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    classes = model(**encoded).logits[0].argmax(-1).tolist()
    places = encoded.word_ids(0)
    return [TAGS[classes[places.index(word)]] for word in range(len(words))]


def test_entities(tmp_path: Path) -> None:
    architecture = "BertForTokenClassification"
    recipe = prepare(tmp_path, architecture, Case("bert", {**WORDS, "id2label": TAGS}, inputs()))
    expert = transformers.BertForTokenClassification.from_pretrained(tmp_path / "task1").requires_grad_(False)
    words = [sentence.split() for sentence in SENTENCES]
    labels = [tags_of(expert, tokenizer_of(tmp_path), row) for row in words]
    rows = [{"tokens": row, "tags": tags} for row, tags in zip(words, labels, strict=True)]
    run = finished(tmp_path, recipe, "token_classification", rows, columns={"text": "tokens", "label": "tags"})
    row, merged = scores(run), merged_model(run, architecture)
    found = [tags_of(merged, tokenizer_of(run), words) for words in words]
    assert (row["metric"], row["samples"], row["expert"]) == ("entity_f1", len(SENTENCES), 1.0)
    assert row["merged"] == pytest.approx(entity_f1(entity_counts(found, labels)))
    assert row["retention"] == pytest.approx(row["merged"])


def test_perplexity(tmp_path: Path) -> None:
    architecture = "LlamaForCausalLM"
    recipe = prepare(tmp_path, architecture, Case("llama", {**WORDS, "pad_token_id": 0}, inputs()), end=False)
    run = finished(tmp_path, recipe, "language_modeling", [{"text": text} for text in SENTENCES])
    row, merged, tokenizer = scores(run), merged_model(run, architecture), tokenizer_of(run)
    losses, count = 0.0, 0
    for sentence in SENTENCES:
        ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
        losses += float(merged(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert row["better"] == "lower"
    assert row["merged"] == pytest.approx(float(torch.tensor(losses / count).exp()), rel=1e-4)
    assert row["retention"] == pytest.approx(row["expert"] / row["merged"])
    low, high = row["intervals"]["merged"]
    assert low < row["merged"] < high


def test_written_text(tmp_path: Path) -> None:
    architecture = "T5ForConditionalGeneration"
    values = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    values |= {"decoder_start_token_id": VOCABULARY["cat"], "vocab_size": len(VOCABULARY)}
    samples = {**inputs(), "decoder_input_ids": inputs()["input_ids"]}
    recipe = prepare(tmp_path, architecture, Case("t5", values, samples), end=True)
    rows = [{"text": text, "label": " ".join(text.split()[:2])} for text in SENTENCES]
    run = finished(tmp_path, recipe, "sequence_to_sequence", rows, max_new_tokens=6, metrics=["chrf", "exact_match"])
    row, merged, tokenizer = scores(run), merged_model(run, architecture), tokenizer_of(run)
    encoded = [tokenizer(text, return_tensors="pt") for text in SENTENCES]
    ids = [merged.generate(**inputs, max_new_tokens=6, eos_token_id=[1, 3], do_sample=False)[0] for inputs in encoded]
    written = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert any(written)
    assert row["metric"] == "chrf"
    assert row["merged"] == pytest.approx(chrf(chrf_counts(written, [row["label"] for row in rows])))
    assert set(row["all"]["merged"]) == {"chrf", "exact_match"}


def test_answers_to_prompts(tmp_path: Path) -> None:
    recipe = prepare(tmp_path, "LlamaForCausalLM", Case("llama", {**WORDS, "pad_token_id": 0}, inputs()), end=False)
    expert: Any = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "task1")
    tokenizer = tokenizer_of(tmp_path)
    rows = []
    for sentence in SENTENCES:
        prompt = tokenizer(sentence, return_tensors="pt")
        ids = expert.generate(**prompt, max_new_tokens=3, eos_token_id=3, do_sample=False)[0]
        answer = tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        is_words = answer and "##" not in answer  # a tokenizer of whole words can't read its own pieces
        rows.append({"text": sentence, "label": answer if is_words else "no"})
    run = finished(tmp_path, recipe, "sequence_to_sequence", rows, max_new_tokens=3, metrics=["exact_match"])
    assert scores(run)["expert"] == pytest.approx(sum(row["label"] != "no" for row in rows) / len(rows))
    assert scores(run)["expert"] > 0


def test_choices(tmp_path: Path) -> None:
    architecture = "LlamaForCausalLM"
    recipe = prepare(tmp_path, architecture, Case("llama", {**WORDS, "pad_token_id": 0}, inputs()), end=False)
    choices = ["yes", "no film", "sky"]
    rows = [{"text": text, "choices": choices, "label": k % 3} for k, text in enumerate(SENTENCES)]
    run = finished(tmp_path, recipe, "multiple_choice", rows)
    merged, tokenizer, right = merged_model(run, architecture), tokenizer_of(run), 0
    for row in rows:
        likelihoods = []
        for choice in choices:
            ids = tokenizer(f"{row['text']} {choice}", return_tensors="pt")["input_ids"]
            each = merged(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            likelihoods.append(float(each[-len(choice.split()) :].sum()))
        right += likelihoods.index(max(likelihoods)) == row["label"]
    assert scores(run)["merged"] == pytest.approx(right / len(rows))


def test_search(tmp_path: Path) -> None:
    recipe = prepare(tmp_path, "BertModel", Case("bert", WORDS, inputs()))
    rows = [{"text": text, "pair": text} for text in SENTENCES]
    row = scores(finished(tmp_path, recipe, "retrieval", rows))
    assert (row["metric"], row["merged"], row["expert"]) == ("recall_at_1", 1.0, 1.0)


def test_what_is_cut_is_warned_of(tmp_path: Path) -> None:
    recipe = prepare(tmp_path, "LlamaForCausalLM", Case("llama", {**WORDS, "pad_token_id": 0}, inputs()), end=False)
    run = finished(tmp_path, recipe, "language_modeling", [{"text": "the cat " * 20}, {"text": "the cat"}])
    warnings = run.warnings(Stage.EVALUATE)
    assert len([warning for warning in warnings if "1 of 2 texts are longer than the 20 tokens" in warning]) == 1


def test_the_base_lends_its_tokenizer(tmp_path: Path) -> None:
    recipe = prepare(tmp_path, "LlamaForCausalLM", Case("llama", {**WORDS, "pad_token_id": 0}, inputs()), end=False)
    for file in (tmp_path / "task1").glob("tokenizer*"):
        file.unlink()
    assert scores(finished(tmp_path, recipe, "language_modeling", [{"text": SENTENCES[0]}]))["samples"] == 1


def test_a_bad_row_fails_the_job_by_its_line(tmp_path: Path) -> None:
    recipe = prepare(
        tmp_path, "BertForSequenceClassification", Case("bert", {**WORDS, "id2label": {0: "no", 1: "yes"}}, inputs())
    )
    file = tmp_path / "test.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([["text", "label"], ["the cat", "yes"], ["dogs", "maybe"]])
    recipe["evaluation"] = {"tasks": [{"task": "task1", "labeled": f"file://{file}"}]}
    with pytest.raises(BadInput, match=r"test\.csv, line 3: column 'label' has .maybe., which is no class"):
        Run(tmp_path, Recipe.model_validate(recipe)).finish()
