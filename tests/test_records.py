"""Files of results are whole or not there."""

import json

import pytest

from examples import records


def test_what_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "made" / "model.safetensors"
    records.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), records.replacing(path) as temporary:
        temporary.write_text("half")
        # A killed program would leave this: loaders that look for the suffix must not find it.
        assert list(path.parent.glob("*.safetensors")) == [path]
        1 / 0
    assert [file.read_text() for file in path.parent.iterdir()] == ["old"]


def test_json_replaces_what_was_there(tmp_path):
    path = tmp_path / "record.json"
    for record in ({"rows": [1]}, {"rows": [1, 2]}):
        records.write_json(path, record)
        assert json.loads(path.read_text()) == record


def test_file_has_the_mode_of_the_umask(tmp_path):
    path, other = tmp_path / "model.safetensors", tmp_path / "other"
    with records.replacing(path) as temporary:
        temporary.write_text("whole")
        temporary.chmod(0o600)
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
