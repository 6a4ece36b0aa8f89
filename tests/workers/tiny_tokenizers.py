"""Tokenizers of a few words, made on the spot and saved as a checkpoint has them."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, RobertaTokenizer

TEXT = """anna lives in paris and bob works at acme corp the cat sat on a mat dogs bark good bad film
yes no red blue sky is what color ? . , question answer"""
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
PIECES = ["##s", "##ly"]
VOCABULARY = {word: number for number, word in enumerate([*SPECIAL, *PIECES, *TEXT.split()])}


def bert_like(folder: Path, longest: int = 20) -> None:
    """Word pieces in lower case between [CLS] and [SEP], with token types."""
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=longest,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


def plain(folder: Path, *, end: bool = False) -> None:
    """Whole words; [CLS] comes first, as a causal model's tokenizer has it, or, with ``end``, [SEP] last, as T5's."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    single, special = ("$A [SEP]", ("[SEP]", 3)) if end else ("[CLS] $A", ("[CLS]", 2))
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[special])
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[SEP]",
        **({} if end else {"bos_token": "[CLS]"}),
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)


def byte_level(folder: Path) -> None:
    """RoBERTa's kind, where a word after a space is another token than one that begins a text."""
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "Ġc", "at", "Ġcat"]
    merges: Any = [("Ġ", "a"), ("Ġ", "c"), ("a", "t"), ("Ġc", "at")]
    RobertaTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges).save_pretrained(
        folder
    )


def files(folder: Path) -> dict[str, bytes]:
    """A folder's files by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}
