"""Files are replaced by whole ones or not at all, whoever else writes to the same path."""

import json
import threading

import pytest

from examples import records
from macko_jax.io.atomic import remove_unfinished, replacing

pytestmark = pytest.mark.once


def test_what_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "made" / "model.safetensors"
    records.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        # A killed program would leave this: loaders that look for the suffix must not find it.
        assert list(path.parent.glob("*.safetensors")) == [path]
        raise ZeroDivisionError
    assert [file.read_text() for file in path.parent.iterdir()] == ["old"]


def test_json_replaces_what_was_there(tmp_path):
    path = tmp_path / "record.json"
    for record in ({"rows": [1]}, {"rows": [1, 2]}):
        records.write_json(path, record)
        assert json.loads(path.read_text()) == record


def test_file_has_the_mode_of_the_umask(tmp_path):
    path, other = tmp_path / "model.safetensors", tmp_path / "other"
    with replacing(path) as temporary:
        temporary.write_text("whole")
        temporary.chmod(0o600)
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def test_threads_that_write_to_one_path_do_not_meet(tmp_path):
    path, ready = tmp_path / "record", threading.Barrier(2)
    failed = []

    def write(text):
        try:
            with replacing(path) as temporary:
                temporary.write_text(text)
                ready.wait()  # both files are written before either is renamed
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert [file.name for file in tmp_path.iterdir()] == ["record"]
    assert path.read_text() in ("one", "two")


def test_what_a_killed_program_leaves_is_removed(tmp_path):
    path = tmp_path / "work" / "0" / "layer.safetensors"
    writing = replacing(path)
    temporary = writing.__enter__()
    temporary.write_text("half")
    (temporary.parent / ".tmpQx4a9Z").write_text("what a library writes beside it")
    kept = tmp_path / "work" / "report.unfinished"
    kept.write_text("a file of another program")
    remove_unfinished(tmp_path)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [kept]
