"""Every kernel compiles for every card, without spills, within its registers and shared memory."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from macko_jax.format import cards
from macko_jax.gpu import device

ROOT = pathlib.Path(__file__).parents[1]
PLUGIN = "jax_plugins.xla_cuda13"
REGISTERS = 65_536  # of an SM
KERNELS = {
    "macko_spmv",
    "macko_spmv_transposed",
    "macko_sddmm",
    "macko_densify",
    "macko_chain",
    "decode_attention",
}


def has_plugin() -> bool:
    try:
        return importlib.util.find_spec(PLUGIN) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.skipif(jax.__version_info__ < device.GUARDING_JAX, reason="needs jax 0.11 or newer")
@pytest.mark.skipif(not has_plugin(), reason=f"needs {PLUGIN}: install the extra aot")
@pytest.mark.parametrize("name", cards.CARDS)
def test_every_kernel_compiles(name):
    card = cards.CARDS[name]
    floats = "^(?!.*float8)" if card.capability < device.ADA else ""
    done = subprocess.run(
        [sys.executable, "-m", "tests.ahead_of_time", f"--only={floats}"],
        cwd=ROOT,
        env=os.environ | {cards.VARIABLE: name, "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    found = {kernel["kernel"] for case in cases for kernel in case["kernels"]}
    assert found == KERNELS and len(cases) >= 9
    for case in cases:
        assert case["kernels"], case["case"]
        for kernel in case["kernels"]:
            # A block has the SM to itself, and its registers are dealt out in eights.
            each = -(-kernel["registers"] // 8) * 8
            assert kernel["spilled"] == 0, (name, case)
            assert each * kernel["threads"] <= REGISTERS, (name, case)
            assert kernel["shared"] <= card.shared_bytes - 1024, (name, case)
