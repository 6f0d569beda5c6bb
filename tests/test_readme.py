"""The README's Python runs as it stands."""

import ast
import pathlib
import re

import pytest

import macko_jax

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCK = r"^```python\n(.*?)^```"


def quickstart() -> str:
    """The first Python block below the heading Quickstart."""
    text = README.read_text()
    heading = re.search(r"^#+ +Quickstart\b", text, re.MULTILINE)
    assert heading, "README.md has no heading 'Quickstart'"
    block = re.search(BLOCK, text[heading.end() :], re.MULTILINE | re.DOTALL)
    assert block, "README.md has no Python block below the heading 'Quickstart'"
    return block[1]


@pytest.mark.slow
def test_quickstart_is_short_and_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = quickstart()
    assert len(code.splitlines()) < 15
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out  # it shows something
    for file in tmp_path.glob("*.safetensors"):
        macko_jax.load(file)


def test_every_python_block_parses():
    blocks = re.findall(BLOCK, README.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        try:
            ast.parse(block)
        except SyntaxError as error:
            pytest.fail(f"README.md has a Python block that does not parse: {error}\n{block}")
