# Everything runs in a virtual environment of the project's own, made on first use.
# PYTHON: any Python 3.11 or newer.  VENV: where the environment lives.  ARGS: for pytest, the demo or llm.
# JAX: one of its versions, instead of the newest that setup.cfg allows and this Python has.
NEW_ENOUGH = -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python3.14; do \
  $$p $(NEW_ENOUGH) && echo $$p && break; done)
VENV ?= .venv
# With an NVIDIA driver present the CUDA build of JAX is installed, else the CPU build.
EXTRAS ?= test,plots,hf$(shell command -v nvidia-smi >/dev/null 2>&1 && echo ,cuda)
comma = ,
RUN = $(VENV)/bin/python
# What is imported is compiled then, and no more.
INSTALL = $(RUN) -m pip install --quiet --no-compile $(if $(JAX),jax==$(JAX) jaxlib==$(JAX)) --editable
PYTEST = $(RUN) -m pytest -n 2 --dist worksteal $(ARGS)
# The files on what JAX may change on its own, whatever the packages do: compilation for GPUs,
# lowering and the interpreter of kernels; primitives and transformations; meshes; exports; jaxprs;
# models of Flax and their files. The longest come first.
BETWEEN = $(patsubst %,tests/test_%.py,ahead_of_time flax_nnx calibration transforms jax_modes fused \
  sharded save_model llama_decode_attention kernels chain checkpoint self_check)
# pytest fails where it finds no test at all, which ARGS may ask of those that are fast, or slow.
OR_NONE = $(if $(ARGS),|| test $$? -eq 5)

.PHONY: demo llm test test-fast test-jax test-between test-slow lint format docs dist clean

demo: $(VENV)/installed
	$(RUN) -m examples.demo $(ARGS)

# A real language model: SmolLM2-135M from its package, compressed, evaluated, and let write.
llm: $(VENV)/installed
	$(RUN) -m examples.llm $(ARGS)

test: $(VENV)/installed
	$(PYTEST)

test-fast: $(VENV)/installed
	$(PYTEST) -m "not slow" $(OR_NONE)

# Those that depend on JAX, for another version of it.
test-jax: $(VENV)/installed
	$(PYTEST) -m "not slow and not once" $(OR_NONE)

# Of these, the files that it might break: for a version between two that test-jax has run with.
test-between: $(VENV)/installed
	$(PYTEST) -m "not slow and not once" $(BETWEEN) $(OR_NONE)

test-slow: $(VENV)/installed
	$(PYTEST) -m slow $(OR_NONE)

lint: $(VENV)/installed-lint
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(VENV)/bin/lint-imports --no-logo
	$(RUN) -m pyright --pythonpath $(RUN)

format: $(VENV)/installed-lint
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

# The site, in site/; warnings are errors.
docs: $(VENV)/installed-docs
	$(RUN) -m mkdocs build --strict

# The sdist and the wheel, in dist/.
dist: $(VENV)/installed-lint
	$(RUN) -m build --outdir dist

$(VENV)/installed: setup.cfg pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) $(NEW_ENOUGH) || { echo "Python 3.11 or newer is needed:" \
	  "found $$(python3 --version 2>&1). Install one, or say make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) ".[$(EXTRAS)]"
	touch $@

# An extra that EXTRAS has is installed already.
$(VENV)/installed-%: $(VENV)/installed
	$(if $(filter $*,$(subst $(comma), ,$(EXTRAS))),,$(INSTALL) ".[$*]")
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
