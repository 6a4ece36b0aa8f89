"""What tiny real models of each kind answer, against plain recomputations; and what they can't be asked."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from service.contract.errors import BadInput, Stopped, UnsupportedArchitecture
from service.contract.evaluation import TaskEvaluation
from service.contract.metrics import METRICS, Kind, Metric
from tests.workers import tiny_models
from tests.workers.tiny_models import IMAGE, TEXT, configuration, pixels, tokens
from tests.workers.tiny_tokenizers import VOCABULARY, files, plain
from workers.exemplars import refuse_if_model_does, refuse_misfits
from workers.forward import class_scores
from workers.measuring import Answers, Setting
from workers.metrics import KINDS
from workers.predicting import token_classes, token_losses
from workers.textfiles import load_tokenizer, read_text

TAGS = {0: "O", 1: "B-PER", 2: "I-PER"}
WORDS = {**TEXT, "vocab_size": len(VOCABULARY)}
T5 = {"vocab_size": len(VOCABULARY), "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def build(architecture: str, config: Any) -> Any:
    """A model as stages load them: its weights are constants."""
    return tiny_models.build(architecture, config).requires_grad_(False)


def silent() -> None:
    """No batch is looked at."""


def setting(kind: str, tokenizer: Any = None, batch_size: int = 4, **asked: Any) -> Setting:
    row = TaskEvaluation.model_validate({"task": "t", "kind": kind, "labeled": "file:///t.jsonl", **asked})
    return Setting(row, batch_size, tokenizer=tokenizer)


def ask(model: Any, samples: dict[str, Tensor], asked: Setting) -> Answers:
    """What a stage does: samples must fit the model before it is asked."""
    kind = KINDS[asked.row.kind]
    inputs = kind.inputs(model, samples)
    refuse_misfits(model, inputs)
    refuse_if_model_does(model, inputs)
    return kind.gather(model, samples, asked)


def score(answers: Answers, metric: Metric) -> float:
    (kind,) = METRICS[metric].kinds[-1:]
    measure = KINDS[kind].measures[metric]
    return measure.figure(measure.contributions(*answers))


@pytest.fixture
def words(tmp_path: Path) -> Any:
    plain(tmp_path / "words")
    return load_tokenizer(files(tmp_path / "words"))


@pytest.fixture
def sentences(tmp_path: Path) -> Any:
    plain(tmp_path / "sentences", end=True)
    return load_tokenizer(files(tmp_path / "sentences"))


def llama(**values: Any) -> Any:
    return build("LlamaForCausalLM", configuration("llama", **{**TEXT, **values}, pad_token_id=0))


def tagger() -> Any:
    return build("BertForTokenClassification", configuration("bert", **TEXT, id2label=TAGS))


# Tags of tokens


def tag_labels(inputs: dict[str, Tensor], seed: int = 0) -> Tensor:
    labels = torch.randint(0, 3, inputs["input_ids"].shape, generator=torch.Generator().manual_seed(seed))
    return labels.masked_fill(inputs["attention_mask"] == 0, -100)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_tags_of_labeled_tokens(batch_size: int) -> None:
    model, inputs = tagger(), tokens()
    labels = tag_labels(inputs)
    labels[:, 1] = -100
    answers = ask(model, {**inputs, "labels": labels}, setting("token_classification", batch_size=batch_size))
    classes = model(**inputs).logits.argmax(-1)
    kept = labels != -100
    assert answers.predictions == [[TAGS[int(c)] for c in row[mask]] for row, mask in zip(classes, kept, strict=True)]
    assert answers.labels == [[TAGS[int(c)] for c in row[mask]] for row, mask in zip(labels, kept, strict=True)]
    assert 0 < score(answers, Metric.ENTITY_F1) < 1


def test_a_tagger_that_is_right_finds_every_entity() -> None:
    model, inputs = tagger(), tokens()
    labels = model(**inputs).logits.argmax(-1).masked_fill(inputs["attention_mask"] == 0, -100)
    assert score(ask(model, {**inputs, "labels": labels}, setting("token_classification")), Metric.ENTITY_F1) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda labels: labels[:, 1:], r"labels have shape \[6, 7\], but tokens \[6, 8\]"),
        (
            lambda labels: labels.masked_fill(labels == 1, 3),
            r"the tag 3, but .* id2label has 0 to 2 \(O, B-PER, I-PER\)",
        ),
        (lambda labels: labels.masked_fill(labels > 0, 0), "no token is labeled with an entity"),
    ],
)
def test_tags_that_do_not_fit(change: Any, words: str) -> None:
    inputs = tokens()
    with pytest.raises(BadInput, match=words):
        ask(tagger(), {**inputs, "labels": change(tag_labels(inputs))}, setting("token_classification"))


def test_tags_need_names() -> None:
    model, inputs = build("BertForTokenClassification", configuration("bert", **TEXT, num_labels=3)), tokens()
    with pytest.raises(BadInput, match=r"config\.json names no tags"):
        ask(model, {**inputs, "labels": tag_labels(inputs)}, setting("token_classification"))


def test_a_model_of_whole_texts_has_no_tags() -> None:
    model = build("BertForSequenceClassification", configuration("bert", **TEXT, id2label=TAGS))
    with pytest.raises(UnsupportedArchitecture, match="no head that scores classes per token"):
        token_classes(model, tokens(), 4, silent)


def test_nan_at_a_token_is_refused_and_at_padding_is_not() -> None:
    model, inputs = tagger(), tokens()
    model.bert.embeddings.word_embeddings.weight[7] = math.nan
    inputs["input_ids"][inputs["input_ids"] == 7] = 8
    assert token_classes(model, inputs, 4, silent).shape == (6, 8)
    inputs["input_ids"][0, 0] = 7
    with pytest.raises(BadInput, match="NaN or infinity"):
        token_classes(model, inputs, 4, silent)


def test_padding_is_not_computed_where_no_sample_of_a_batch_needs_it() -> None:
    model, inputs, lengths = tagger(), tokens(), list[int]()
    whole = model(**inputs).logits.argmax(-1)
    model.register_forward_hook(lambda _, __, output: lengths.append(output.logits.shape[1]))
    attended = inputs["attention_mask"].bool()
    wider = {name: functional.pad(values, (0, 3)) for name, values in inputs.items()}
    found = token_classes(model, wider, 2, silent)
    assert torch.equal(found[:, :8][attended], whole[attended])
    assert found.shape == (6, 11)
    assert lengths == [int(attended[k : k + 2].any(0).sum()) for k in (0, 2, 4)]


# Likelihood of text


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_losses_are_those_the_model_is_trained_by(batch_size: int) -> None:
    model, inputs = llama(), tokens()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    answers = ask(model, dict(inputs), setting("language_modeling", batch_size=batch_size))
    expected = math.exp(float(model(**inputs, labels=labels).loss))
    assert score(answers, Metric.PERPLEXITY) == pytest.approx(expected, rel=1e-5)


def test_tokens_without_a_label_do_not_count() -> None:
    model, inputs = llama(), tokens()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :2] = -100
    labels[3] = -100
    answers = ask(model, {**inputs, "labels": labels}, setting("language_modeling"))
    expected = math.exp(float(model(**inputs, labels=labels).loss))
    assert score(answers, Metric.PERPLEXITY) == pytest.approx(expected, rel=1e-5)


def test_a_token_after_padding_has_nothing_before_it() -> None:
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    whole = ask(llama(), {"input_ids": ids}, setting("language_modeling"))
    padded = {
        "input_ids": functional.pad(ids, (3, 0)),
        "attention_mask": functional.pad(torch.ones_like(ids), (3, 0)),
    }
    found = ask(llama(), padded, setting("language_modeling"))
    assert score(found, Metric.PERPLEXITY) == pytest.approx(score(whole, Metric.PERPLEXITY), rel=1e-4)


def test_the_first_token_of_each_sample_is_foretold_by_nothing() -> None:
    inputs = tokens()
    flipped = {name: values.flip(1) for name, values in inputs.items()}  # padded at the start, each to another length
    losses = token_losses(llama(), flipped, 4, silent)
    firsts = flipped["attention_mask"].argmax(1)
    assert not losses[torch.arange(6), firsts].any()
    assert (losses > 0).sum(1).tolist() == (flipped["attention_mask"].sum(1) - 1).tolist()


def test_labels_that_are_not_the_text() -> None:
    inputs = tokens()
    with pytest.raises(BadInput, match="labels must repeat input_ids"):
        ask(llama(), {**inputs, "labels": inputs["input_ids"].roll(1, 1)}, setting("language_modeling"))
    with pytest.raises(BadInput, match="no token counts"):
        ask(llama(), {"input_ids": inputs["input_ids"][:, :1]}, setting("language_modeling"))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("BertForMaskedLM", configuration("bert", **TEXT)),
        ("BertForSequenceClassification", configuration("bert", **TEXT)),
        ("T5ForConditionalGeneration", configuration("t5", **T5)),
    ],
)
def test_models_that_foretell_no_text(architecture: str, config: Any) -> None:
    with pytest.raises(UnsupportedArchitecture, match="likelihoods need a causal language model"):
        token_losses(build(architecture, config), tokens(), 4, silent)


def test_a_broken_language_model_is_refused() -> None:
    model = llama()
    model.lm_head.weight[:] = math.nan
    with pytest.raises(BadInput, match="NaN or infinity"):
        ask(model, tokens(), setting("language_modeling"))


def test_a_large_vocabulary_goes_through_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, sizes = llama(), tokens(), list[int]()
    model.register_forward_hook(lambda _, __, output: sizes.append(len(output.logits)))
    whole = token_losses(model, inputs, 6, silent)
    monkeypatch.setattr("workers.predicting.LOGIT_BYTES", 2 * 8 * 50 * 4)
    torch.testing.assert_close(token_losses(model, inputs, 6, silent), whole, rtol=1e-5, atol=1e-5)
    assert sizes == [6, 2, 2, 2]


def test_a_batch_may_be_the_last() -> None:
    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        token_losses(llama(), tokens(), 2, stop)


# Several answers


def choices(samples: int = 5, answers: int = 3, length: int = 7) -> dict[str, Tensor]:
    rows = tokens(samples * answers, length)
    inputs = {name: values.reshape(samples, answers, length) for name, values in rows.items()}
    scored = inputs["attention_mask"].bool() & (torch.arange(length) >= 1)
    return {**inputs, "scored": scored, "labels": torch.arange(samples) % answers}


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_a_choice_scores_by_its_likelihood(batch_size: int) -> None:
    model, samples = llama(), choices()
    samples["scored"][0, 2] = False
    predictions, labels = ask(model, samples, setting("multiple_choice", batch_size=batch_size))
    assert labels.tolist() == [0, 1, 2, 0, 1]
    for i in range(5):
        for j in range(3):
            ids, scored = samples["input_ids"][i, j : j + 1], samples["scored"][i, j]
            likelihoods = model(input_ids=ids).logits[0].log_softmax(-1)
            each = [float(likelihoods[t - 1, ids[0, t]]) for t in range(1, 7) if scored[t]]
            assert predictions[i, j] == pytest.approx(sum(each) if each else -math.inf, rel=1e-4)


def test_a_head_for_multiple_choice_scores_by_itself() -> None:
    model, samples = build("BertForMultipleChoice", configuration("bert", **TEXT)), choices()
    del samples["scored"]
    predictions, _ = ask(model, samples, setting("multiple_choice", batch_size=2))
    inputs = {name: values for name, values in samples.items() if name != "labels"}
    torch.testing.assert_close(torch.from_numpy(predictions).float(), model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_choices_that_do_not_fit() -> None:
    def refused(words: str, **changes: Tensor | None) -> None:
        samples = {name: values for name, values in {**choices(), **changes}.items() if values is not None}
        with pytest.raises(BadInput, match=words):
            ask(llama(), samples, setting("multiple_choice"))

    refused(r"sample 2 has the label 3, but there are 3 choices, 0 to 2", labels=torch.tensor([0, 1, 3, 0, 1]))
    refused(
        r"the right choice of sample 1 has no token", scored=choices()["scored"] & (torch.arange(5) != 1)[:, None, None]
    )
    refused("tensor 'scored' .* is missing", scored=None)
    refused(r"'scored' has shape \[5, 3, 6\]", scored=choices()["scored"][..., 1:])
    refused(r"'input_ids' has shape \[5, 3\]; multiple choice takes", input_ids=torch.ones(5, 3).long())


# Written text


def t5(start: int | None = 0) -> Any:
    model = build("T5ForConditionalGeneration", configuration("t5", **T5, decoder_start_token_id=start))
    model.shared.weight.mul_(0.02)  # else a token, whose scores come from the same table, is followed by itself
    return model


def greedily(model: Any, ids: Tensor, steps: int) -> list[int]:
    """The likeliest next tokens of a causal model, each from a whole pass of its own."""
    for _ in range(steps):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, -steps:].tolist()


def test_a_causal_model_goes_on_where_the_prompt_ends(words: Any) -> None:
    model = llama(vocab_size=len(VOCABULARY))
    rows = [{"text": "the sky is", "label": "blue"}, {"text": "what color is the sky", "label": "red and blue"}]
    asked = setting("sequence_to_sequence", words, max_new_tokens=4)
    data = "\n".join(map(json.dumps, rows)).encode()
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    answers = ask(model, dict(read_text(data, "t.jsonl", asked.row, words, config).tensors), asked)
    assert answers.labels == ["blue", "red and blue"]
    for row, written in zip(rows, answers.predictions, strict=True):
        ids = greedily(model, torch.tensor([words(row["text"])["input_ids"]]), 4)
        assert 3 not in ids  # else the text would end there
        assert written == words.decode(ids, skip_special_tokens=True) != ""


def gpt2(positions: int) -> Any:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": positions}
    return build("GPT2LMHeadModel", configuration("gpt2", vocab_size=len(VOCABULARY), **sizes))


def test_a_prompt_and_what_is_written_need_positions(words: Any) -> None:
    samples = {"input_ids": tokens()["input_ids"].clamp(3, 30), "labels": torch.full((6, 1), 7)}
    length = samples["input_ids"].shape[1]
    sentence = rf"has 10 positions: too few for {length} tokens to go on from and 6 new ones \(max_new_tokens\)"
    with pytest.raises(BadInput, match=sentence):
        ask(gpt2(10), samples, setting("sequence_to_sequence", words, max_new_tokens=6))
    with pytest.raises(BadInput, match=rf"too few for {length} tokens to go on from and a new one"):
        ask(gpt2(length), samples, setting("sequence_to_sequence", words))
    assert len(ask(gpt2(10), samples, setting("sequence_to_sequence", words)).predictions) == 6, (
        "as many as there is room"
    )


def test_padding_before_a_prompt_takes_no_room(words: Any) -> None:
    model, ids = gpt2(8), tokens()["input_ids"].clamp(3, 30)[:, :4]
    padded = torch.cat([torch.zeros(6, 4).long(), ids], 1)
    mask = torch.cat([torch.zeros(6, 4), torch.ones(6, 4)], 1).long()
    asked = setting("sequence_to_sequence", words, max_new_tokens=4)
    labels = {"labels": torch.full((6, 1), 7)}
    plainly = ask(model, {"input_ids": ids, **labels}, asked).predictions
    assert ask(model, {"input_ids": padded, "attention_mask": mask, **labels}, asked).predictions == plainly


def test_generation_config_says_which_tokens_end_a_text_and_nothing_else(words: Any) -> None:
    model = llama(vocab_size=len(VOCABULARY))

    def insist(_: Any, __: Any, output: Any) -> None:
        output.logits[..., 7] = 100.0

    model.register_forward_hook(insist)
    samples = {"input_ids": tokens()["input_ids"].clamp(4, 30), "labels": torch.full((6, 1), 7)}
    asked = setting("sequence_to_sequence", words, max_new_tokens=3)
    stated = {"eos_token_id": [7], "do_sample": True, "num_beams": 3, "min_new_tokens": 3}
    assert ask(model, samples, asked).predictions == [words.decode([7, 7, 7])] * 6
    answers = ask(model, samples, replace(asked, generation=stated))
    assert answers.predictions == [words.decode([7])] * 6


def test_a_causal_classifier_without_a_padding_token_scores_at_the_last_token() -> None:
    sizes = {"num_hidden_layers": 1, "num_key_value_heads": 2, "num_labels": 3}
    config = configuration("llama", **{**TEXT, "type_vocab_size": None, **sizes}, pad_token_id=None)
    model = build("LlamaForSequenceClassification", config)
    inputs = tokens()
    assert not inputs["attention_mask"].all(), "some samples are padded at their end"
    scores = class_scores(model, inputs, batch_size=4)
    for index, mask in enumerate(inputs["attention_mask"].bool()):
        alone = model(input_ids=inputs["input_ids"][index : index + 1, mask]).logits
        torch.testing.assert_close(scores[index : index + 1], alone)


def test_padding_after_a_prompt_is_refused(words: Any) -> None:
    inputs = tokens()
    samples = {**inputs, "labels": torch.full((6, 1), 5)}
    with pytest.raises(BadInput, match=r"ends in padding; LlamaForCausalLM goes on where its input ends, so pad"):
        ask(llama(vocab_size=51), samples, setting("sequence_to_sequence", words))


def test_an_encoder_reads_and_a_decoder_writes(sentences: Any) -> None:
    model, inputs = t5(), {name: values.clamp(max=len(VOCABULARY) - 1) for name, values in tokens().items()}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    answers = ask(model, {**inputs, "labels": labels}, setting("sequence_to_sequence", sentences, max_new_tokens=5))
    assert any(answers.predictions)
    assert answers.labels == [sentences.decode(row[row != -100], skip_special_tokens=True) for row in labels]
    for index, written in enumerate(answers.predictions):
        ids = torch.zeros(1, 1, dtype=torch.long)
        sample = {name: values[index : index + 1] for name, values in inputs.items()}
        for _ in range(5):
            logits = model(**sample, decoder_input_ids=ids).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            if ids[0, -1] in (1, 3):  # the model's own end, and the tokenizer's
                break
        assert written == sentences.decode(ids[0], skip_special_tokens=True)


def test_writing_needs_no_luck(sentences: Any) -> None:
    model, inputs = t5(), {name: values.clamp(max=len(VOCABULARY) - 1) for name, values in tokens().items()}
    model.generation_config.do_sample, model.generation_config.num_beams = True, 3
    samples = {**inputs, "labels": inputs["input_ids"]}
    texts = [ask(model, samples, setting("sequence_to_sequence", sentences)).predictions for _ in range(2)]
    assert texts[0] == texts[1]


def test_a_text_ends_where_the_tokenizer_says(words: Any) -> None:
    model, steps = llama(vocab_size=len(VOCABULARY)), list[int]()

    def end(_: Any, __: Any, output: Any) -> None:
        steps.append(1)
        output.logits[..., words.eos_token_id] = 100.0

    model.register_forward_hook(end)
    samples = {"input_ids": tokens()["input_ids"].clamp(3, 30), "labels": torch.full((6, 1), 7)}
    assert model.generation_config.eos_token_id != words.eos_token_id
    answers = KINDS[Kind.SEQUENCE_TO_SEQUENCE].gather(model, samples, setting("sequence_to_sequence", words, 6))
    assert answers.predictions == [""] * 6
    assert len(steps) == 1


def captioner() -> tuple[Any, dict[str, Tensor]]:
    encoder, decoder = (
        configuration("vit", **IMAGE),
        configuration(
            "gpt2",
            vocab_size=len(VOCABULARY),
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=2,
            eos_token_id=3,
            add_cross_attention=True,
            is_decoder=True,
        ),
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=2, pad_token_id=0
    )
    return build("VisionEncoderDecoderModel", config), pixels()


def blip() -> tuple[Any, dict[str, Tensor]]:
    text = {
        **WORDS,
        "encoder_hidden_size": 16,
        "bos_token_id": 2,
        "sep_token_id": 3,
        "pad_token_id": 0,
        "eos_token_id": 3,
    }
    config = configuration("blip", text_config=text, vision_config=IMAGE, projection_dim=8)
    return build("BlipForConditionalGeneration", config), pixels()


@pytest.mark.parametrize("made", [captioner, blip])
def test_captions_of_images(made: Any, words: Any) -> None:
    model, inputs = made()
    labels = torch.full((5, 2), VOCABULARY["cat"])
    answers = ask(model, {**inputs, "labels": labels}, setting("sequence_to_sequence", words, max_new_tokens=3))
    assert answers.labels == ["cat cat"] * 5
    assert len(answers.predictions) == 5
    assert all(1 <= len(text.split()) <= 3 for text in answers.predictions)
    assert 0 <= score(answers, Metric.CHRF) <= 100


def test_text_that_can_not_be_written(sentences: Any) -> None:
    inputs = {name: values.clamp(max=len(VOCABULARY) - 1) for name, values in tokens().items()}
    samples = {**inputs, "labels": inputs["input_ids"]}

    def refused(error: type[Exception], match: str, model: Any, tokenizer: Any = sentences, **changes: Tensor) -> None:
        with pytest.raises(error, match=match):
            ask(model, {**samples, **changes}, setting("sequence_to_sequence", tokenizer))

    refused(BadInput, "the task's checkpoint has none", t5(), None)
    refused(BadInput, "sample 2 has no labels", t5(), labels=samples["labels"].index_fill(0, torch.tensor(2), -100))
    refused(
        BadInput, r"labels reach from \d+ to 99, but the tokenizer's", t5(), labels=samples["labels"].clone().fill_(99)
    )
    refused(UnsupportedArchitecture, "BertModel writes no text", build("BertModel", configuration("bert", **WORDS)))
    refused(UnsupportedArchitecture, "can't write text: .*decoder_start_token_id", t5(None))
    broken = t5()
    broken.shared.weight[:] = math.nan
    refused(BadInput, "NaN", broken)


# Search


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_a_query_finds_its_document_by_cosine(batch_size: int) -> None:
    model, queries, documents = build("BertModel", configuration("bert", **TEXT)), tokens(5, 6), tokens(9, 8, seed=2)
    samples = {f"query.{name}": values for name, values in queries.items()}
    samples |= {f"document.{name}": values for name, values in documents.items()}
    labels = torch.tensor([3, 1, 8, 8, 0])
    ranks, _ = ask(model, {**samples, "labels": labels}, setting("retrieval", batch_size=batch_size))

    def features(inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs["attention_mask"].float()[..., None]
        hidden = model(**inputs).last_hidden_state
        return functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    order = (features(queries) @ features(documents).T).argsort(1, descending=True)
    assert ranks.tolist() == [order[q].tolist().index(int(labels[q])) + 1 for q in range(5)]


def test_every_text_is_nearest_to_itself() -> None:
    model, texts = build("BertModel", configuration("bert", **TEXT)), tokens(6)
    samples = {f"{side}.{name}": values for side in ("query", "document") for name, values in texts.items()}
    answers = ask(model, {**samples, "labels": torch.arange(6)}, setting("retrieval"))
    assert score(answers, Metric.RECALL_AT_1) == 1


def test_searches_that_do_not_fit() -> None:
    model, texts = build("BertModel", configuration("bert", **TEXT)), tokens(6)
    samples = {f"{side}.{name}": values for side in ("query", "document") for name, values in texts.items()}

    def refused(words: str, samples: dict[str, Tensor], labels: Tensor) -> None:
        with pytest.raises(BadInput, match=words):
            ask(model, {**samples, "labels": labels}, setting("retrieval"))

    refused("labels reach from 0 to 6, but there are 6 documents, 0 to 5", samples, torch.tensor([0, 1, 2, 3, 4, 6]))
    refused(r"labels have shape \[5\], but there are 6 queries", samples, torch.arange(5))
    only = {name: values for name, values in samples.items() if name.startswith("query")}
    refused("there are no inputs 'document.<input>'", only, torch.arange(6))
    refused("there are no inputs 'query.<input>'", dict(texts), torch.arange(6))
    model.embeddings.word_embeddings.weight[:] = math.nan
    refused("the features of a query are NaN", samples, torch.arange(6))


def test_every_kind_has_every_metric_of_its() -> None:
    for kind in Kind:
        assert set(KINDS[kind].measures) == {metric for metric, row in METRICS.items() if kind in row.kinds}
