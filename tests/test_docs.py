"""What the documentation says runs, and points to what is there."""

import json
import os
import pathlib
import re

import pytest

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
RUN = sorted(path for path in (DOCS / "guide").glob("*.md") if BLOCK.search(path.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda path: path.stem)
def test_the_blocks_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(BLOCK.findall(page.read_text()))
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


@pytest.mark.slow
def test_the_tutorial_runs_and_shows_its_outputs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count == i for i, cell in enumerate(cells, start=1)), "run it anew"
    assert any(cell.outputs for cell in cells)
    # Its kernel works elsewhere, and is to find the packages beside these tests.
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), path]))
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=240, resources=resources).execute()


@pytest.mark.parametrize(
    "page", [*sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*.md"))], ids=lambda path: path.name
)
def test_links_point_to_files(page):
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_every_record_has_a_line_in_the_index_and_every_line_a_record():
    records = {path.name for path in (DOCS / "results").glob("*.json")}
    index = (DOCS / "results/index.md").read_text()
    listed = set(re.findall(r"^\| \[\w+\]\((\w+\.json)\)", index, re.MULTILINE))
    assert listed == records
    for name in records:
        json.loads((DOCS / "results" / name).read_text())


def test_the_page_on_kernels_stays_short():
    assert len((DOCS / "kernel.md").read_text().splitlines()) <= 200
