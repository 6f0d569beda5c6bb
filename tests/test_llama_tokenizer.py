"""Tokenizers as they are on the hub: what is stored in them does not drop, add or lose text."""

import json
import os

import pytest

from examples.llama import tokenizer as tokenizers_of_models

pytestmark = pytest.mark.once

tokenizers = pytest.importorskip("tokenizers")


def store(directory, vocab, *, special=(), post_processor=None, **options):
    """A tokenizer of whole words in a model directory, loaded."""
    words = {word: i for i, word in enumerate(vocab)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=vocab[0]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    if "truncation" in options:
        tokenizer.enable_truncation(options["truncation"])
    if "padding" in options:
        tokenizer.enable_padding(length=options["padding"], pad_token=vocab[0])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    return tokenizers_of_models.load_tokenizer(directory, len(vocab))


def test_stored_truncation_and_padding_are_off(tmp_path):
    tokenizer = store(tmp_path, ["<pad>", "</s>", "the", "cat"], truncation=16, padding=8)
    assert tokenizer.encode("the cat") == [2, 3]
    assert len(tokenizer.encode("the cat " * 500)) == 1000


def test_a_text_has_one_token_that_begins_it(tmp_path):
    template = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer = store(
        tmp_path, ["<s>", "</s>", "hi"], special=["<s>", "</s>"], post_processor=template
    )
    assert tokenizer.encode("hi") == tokenizer.encode("<s>hi") == [0, 2]
    assert tokenizer.encode("hi", add_bos=False) == [2]
    assert tokenizer.encode("") == [0]
    by_bytes = tokenizers_of_models.ByteTokenizer()
    assert by_bytes.encode("a") == by_bytes.encode("\0a") == [0, 97]
    assert by_bytes.encode("a", add_bos=False) == [97]


def test_a_continuation_keeps_its_first_space(tmp_path):
    vocab = {"<unk>": 0, "</s>": 1, "\u2581Hello": 2, "\u2581world": 3}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>")
    )
    decoders = tokenizers.decoders  # those of Llama 2 and Mistral
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers_of_models.load_tokenizer(tmp_path, 4)
    assert loaded.decode([3]) == "world"
    assert tokenizers_of_models.continuation(loaded, [2], [3]) == " world"
    assert tokenizers_of_models.continuation(loaded, [2], []) == ""


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model": 3}', "[" * 10**5])
def test_damaged_tokenizers_are_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer.json is not a whole tokenizer"):
        tokenizers_of_models.load_tokenizer(tmp_path, 4)


def test_tokenizers_that_fail_are_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    tokenizer = tokenizers_of_models.load_tokenizer(tmp_path, 4)
    with pytest.raises(ValueError, match=f"{path} cannot encode the text .WordLevel error"):
        tokenizer.encode("b")
    with pytest.raises(ValueError, match=f"{path} cannot encode the text"):
        tokenizer.encode("\udcff")  # a byte of the command line that is not UTF-8


def test_damaged_files_beside_a_tokenizer_are_named(tmp_path):
    store(tmp_path, ["<s>", "</s>"])
    path = tmp_path / "generation_config.json"
    for stop in ("1", [1, "2"], -1, 1.5, True, {}):
        path.write_text(json.dumps({"eos_token_id": stop}))
        with pytest.raises(ValueError, match=f"{path}: eos_token_id must be"):
            tokenizers_of_models.load_tokenizer(tmp_path, 2)
    path.write_text(json.dumps({"eos_token_id": [0]}))
    assert tokenizers_of_models.load_tokenizer(tmp_path, 2).stop_tokens == {0, 1}
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json is not a regular file"):
        tokenizers_of_models.load_tokenizer(tmp_path, 2)
