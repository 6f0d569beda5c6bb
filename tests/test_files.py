"""Texts and records of strangers: read whole, or refused by a sentence that names the file."""

import functools
import json
import os

import numpy as np
import pytest

import macko_jax
from examples import files
from examples.benchmarks.record_fields import KINDS, read_record
from examples.llama import own_text
from tests.test_fuzz import DEEP, LLAMA, ends_well, mutate_json

pytestmark = pytest.mark.once


def test_texts_are_in_utf8(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("\ufeffgrüß\n".encode())
    assert files.read_text(path) == "grüß\n"
    path.write_bytes("grüß".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{path} is not text in UTF-8 .*; convert it"):
        files.read_text(path)
    with pytest.raises(ValueError, match=f"{path} has more than 3 bytes"):
        files.read_text(path, most=3)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} is missing"):
        files.read_text(path)
    for put in (os.mkfifo, os.mkdir, lambda place: place.symlink_to("/dev/zero")):
        put(path)
        with pytest.raises(ValueError, match=f"{path} is not a regular file"):
            files.read_text(path)
        path.rmdir() if path.is_dir() else path.unlink()


RECORDS = {
    "spmv": {
        "device": "H200",
        "records": [
            {"implementation": "macko", "dtype": "float16", "batch": 1, "rows": 8, "cols": 8}
            | {"density": 0.5, "speedup": 1.5}
        ],
    },
    "decode": {
        "device": "H200",
        "dtype": "float16",
        "prompt": 8,
        "batch": 1,
        "config": None,
        "results": [{"density": 1, "tokens_per_second": 1.5, "weight_bytes": 10**9}],
    },
    "methods": {
        "dense": {"bits_per_byte": 0.9, "bytes": 100},
        "settings": {"checkpoint": "x"},
        "rows": [{"method": "dsf", "bits_per_byte": 1.5, "bytes": 50, "asked_density": 0.5}],
    },
    "errors": {"density": 0.5, "layers": [{"path": "a/0/b", "method": "dsf", "error": 0.5}]},
    "refine": {"refined": {"0": {"before": 0.5, "after": 0.25}}},
    "refinement": {
        "settings": {},
        "rows": [
            {"stage": "block", "method": "dsf", "density": 0.5, "seconds": 1.5}
            | {"perplexity": {"text": 20.5}, "agreement": {"overlap": 0.75}}
        ],
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_records_name_the_field_that_is_odd(kind, tmp_path):
    path = tmp_path / "record.json"
    whole = json.dumps(RECORDS[kind])
    path.write_text(whole)
    assert read_record(path, kind) == RECORDS[kind]
    for number in ("0.5", "1.5", '"dsf"', '"macko"', '"H200"'):
        for odd in ("[1]", "true", "NaN", "1e400", "{}"):
            if number in whole:
                path.write_text(whole.replace(number, odd, 1))
                with pytest.raises(
                    ValueError, match=f"{path} is no record of kind {kind}: .* must be"
                ):
                    read_record(path, kind)
    for odd in ("[]", "{}", "3", "null", DEEP, "\xff"):
        path.write_text(odd, encoding="latin-1")
        with pytest.raises(ValueError, match=str(path)):
            read_record(path, kind)


def test_mutated_records_end_well(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "record.json"
    for i in range(20 * len(KINDS)):
        kind = [*KINDS][i % len(KINDS)]
        path.write_text(mutate_json(rng, RECORDS[kind]), errors="surrogatepass")
        ends_well(functools.partial(read_record, path, kind), path)


def test_damaged_text_of_a_model_is_named(tmp_path):
    path = tmp_path / own_text.FILE
    for put in (
        lambda: path.write_bytes(b"PK"),
        lambda: macko_jax.save(path, [1]),
        lambda: macko_jax.save(path, {"tokens": 3}),
    ):
        put()
        with pytest.raises(ValueError, match=f"{path} is damaged .*; remove it"):
            own_text.own_windows(LLAMA, tmp_path, 2, 16)
    windows = np.zeros((2, 16), np.int32)
    macko_jax.save(path, {"tokens": windows + 96, "described": "other"})
    with pytest.raises(ValueError, match=f"{path} is damaged .token 96 is not in the model's"):
        own_text.own_windows(LLAMA, tmp_path, 2, 16)
    macko_jax.save(path, {"tokens": windows, "described": "other"})
    with pytest.raises(ValueError, match=f"{path} was written by another model"):
        own_text.own_windows(LLAMA, tmp_path, 2, 16)
