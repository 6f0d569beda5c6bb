"""What keeps the house in order: the public names, lengths, records, versions, and imports."""

import ast
import configparser
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import dsf_jax
import macko_jax
from macko_jax import _compatibility

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = (macko_jax, dsf_jax)
FOLDERS = ("macko_jax", "dsf_jax", "examples")
LONGEST = 80  # lines of a function, without its docstring


def python_files() -> list[pathlib.Path]:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    return files


def name_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def has_own_docstring(thing: object) -> bool:
    """Whether somebody wrote a docstring: dataclasses and named tuples make one of their fields."""
    text = thing.__doc__ if inspect.isroutine(thing) else vars(thing).get("__doc__")
    return bool(text) and not text.startswith(f"{getattr(thing, '__name__', '')}(")


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_public_names_are_the_packages_own_and_documented(package):
    names = dir(package)
    assert names == sorted(names) and sorted(set(package.__all__)) == names
    assert has_own_docstring(package)
    for name in names:
        thing = getattr(package, name)
        assert not name.startswith("_"), name
        home = thing.__name__ if inspect.ismodule(thing) else thing.__module__
        assert home.split(".")[0] in ("macko_jax", "dsf_jax"), f"{name} is {home}'s"
        assert has_own_docstring(thing), f"{package.__name__}.{name} has no docstring"


def test_one_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", macko_jax.__version__)
    assert dsf_jax.__version__ == macko_jax.__version__
    version = re.escape(macko_jax.__version__)
    assert re.search(rf"^## \[{version}\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


def test_versions_of_jax_are_those_of_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    oldest = ".".join(map(str, _compatibility.OLDEST))
    major, minor = _compatibility.NEWEST
    bounds = f">={oldest},<{major}.{minor + 1}"
    asked = config["options"]["install_requires"].split()
    assert {f"jax{bounds}", f"jaxlib{bounds}"} <= set(asked)
    assert f"jax[cuda13]{bounds}" in config["options.extras_require"]["cuda"].split()


@pytest.mark.slow
def test_importing_macko_jax_imports_neither_flax_nor_optax():
    code = "import sys, macko_jax; print(sorted({'flax', 'optax', 'dsf_jax'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_folder_of_files_is_a_package():
    """Others would be left out of the wheel."""
    folders = {path.parent for path in python_files()}
    assert [name_of(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def imports_of(path: pathlib.Path) -> set[str]:
    """What a file imports, with the names that it takes from packages, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.once
def test_no_file_imports_a_script():
    """One process can hold the flags of one script only: absl refuses a name defined twice."""
    importers = [*python_files(), *sorted((ROOT / "tests").glob("*.py"))]
    scripts = {
        name_of(path).removesuffix(".py").replace("/", ".")
        for path in python_files()
        if re.search(r"^\w* ?=? ?flags\.DEFINE", path.read_text(), re.MULTILINE)
    } - {"examples.cli"}
    assert len(scripts) > 10
    imported = {name_of(path): sorted(imports_of(path) & scripts) for path in importers}
    assert {path: names for path, names in imported.items() if names} == {}


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring's."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


@pytest.mark.once
def test_functions_are_short():
    long = {}
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and code_lines(node) > LONGEST:
                long[f"{name_of(path)}:{node.name}"] = code_lines(node)
    assert long == {}


def records() -> set[str]:
    """The names of the records of results, in docs/results."""
    found = {path.name for path in (ROOT / "docs" / "results").iterdir()}
    return {name for name in found if name.endswith((".json", ".csv"))}


def pages() -> dict[str, str]:
    """Text of the README and of all pages of docs/ but the records' own index, by path."""
    files = [ROOT / "README.md", ROOT / "WORKSPACE.md", *(ROOT / "docs").rglob("*.md")]
    index = ROOT / "docs" / "results"
    return {name_of(path): path.read_text() for path in files if path.parent != index}


def test_every_record_is_quoted_or_tested():
    tests = [path.read_text() for path in sorted((ROOT / "tests").glob("*.py"))]
    text = "\n".join([*pages().values(), *tests])
    quoted = {name for name in records() if re.search(rf"(?<![\w-]){re.escape(name)}", text)}
    assert sorted(records() - quoted) == []


def test_every_quoted_record_exists():
    """Records are quoted as results/NAME, or by a name with the device's in it."""
    quoted = {}
    for path, text in pages().items():
        for name in re.findall(r"\bresults/([\w-]+\.(?:json|csv))", text):
            quoted[name] = path
        for name in re.findall(r"(?<![\w/-])([\w-]+_(?:h100|h200|cpu)\w*\.(?:json|csv))", text):
            quoted[name] = path
    assert quoted
    assert {name: path for name, path in quoted.items() if name not in records()} == {}


# What a flag is about, wherever a script has it: a part of each of its helps.
FLAGS = {
    "batch": "at a time|per (step|call)",
    "calibration": "Text file to calibrate on",
    "checkpoint": "[Dd]irectory of a|Hugging Face directory",
    "dsf_options": "JSON object of options",
    "eval_windows": "Windows to evaluate",
    "length": "Tokens of a",
    "new_tokens": "[Tt]okens",
    "out": "File|[Dd]irectory|[Rr]ecord",
    "repeats": "Timed|Passes",
    "seed": "Seed of",
    "temperature": "0 takes the likeliest token",
    "tensor_parallel": "Devices that share",
    "text": "Text file",
    "windows": "Windows to calibrate on",
}
# Other words for what these and --density name.
SYNONYMS = {
    *("output", "output_dir", "outdir", "save", "model", "model_path", "sparsity", "keep"),
    *("num_windows", "nsamples", "samples", "max_tokens", "max_new_tokens", "tokens"),
    *("seq_len", "sequence_length", "batch_size", "random_seed", "devices_per_model", "tp"),
}


def test_a_flag_has_one_meaning_and_a_meaning_one_flag():
    for path in sorted((ROOT / "examples").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(node, "func", None), "attr", "")
            if not name.startswith("DEFINE_"):
                continue
            flag, *others = map(ast.unparse, node.args)
            flag = ast.literal_eval(flag)
            assert flag not in SYNONYMS, f"{path.name}: --{flag} has another name elsewhere"
            assert re.search(FLAGS.get(flag, ""), " ".join(others)), f"{path.name}: --{flag}"
