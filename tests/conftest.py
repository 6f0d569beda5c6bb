"""Set up before JAX starts: several CPU devices; GPU tests are skipped where there is no GPU."""

import gc
import importlib.metadata
import os
import shutil
import tempfile

gc.disable()  # until everything is imported, which stays

# Most of the time goes into compilation, so that little is optimized but for tests with the mark
# `optimized`; processes that the tests start inherit it. What is in XLA_FLAGS has the last word.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
QUICK = ["--xla_cpu_parallel_codegen_split_count=1"]  # the workers of pytest fill the cores
if importlib.metadata.version("jaxlib") < "0.12":
    # XLA's new emitter of fusions compiles slowly. Newer ones have no other, so their tests run it.
    QUICK.append("--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true")
os.environ["XLA_FLAGS"] = " ".join(
    [*QUICK, os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4"]
)

# Workers and the programs that tests start find there what another has compiled.
OWN_CACHE = "JAX_COMPILATION_CACHE_DIR" not in os.environ
if OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="macko-dsf-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile(
    "default",
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")


if jax.default_backend() == "cpu":
    # Matrices are packed for a GPU, whose kernels the tests lower and interpret.
    os.environ.setdefault("MACKO_JAX_CARD", "H200")


def pytest_collection_modifyitems(items):
    if any(device.platform == "gpu" for device in jax.devices()):
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="JAX finds no GPU"))


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    optimized = any(item.get_closest_marker(name) for name in ("optimized", "gpu"))
    jax.config.update("jax_disable_most_optimizations", not optimized)


def pytest_unconfigure():
    if OWN_CACHE:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
