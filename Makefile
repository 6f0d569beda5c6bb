# Everything runs in a virtual environment of the project's own, made on first use.
# PYTHON: any Python 3.11 or newer.  VENV: where the environment lives.
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3)
VENV ?= .venv
# With an NVIDIA driver present the CUDA build of JAX is installed, else the CPU build.
EXTRAS ?= test,plots,hf$(shell command -v nvidia-smi >/dev/null 2>&1 && echo ,cuda)
RUN = $(VENV)/bin/python

.PHONY: demo test clean

demo: $(VENV)/installed
	$(RUN) -m examples.demo $(ARGS)

test: $(VENV)/installed
	$(RUN) -m pytest -n 2 $(ARGS)

$(VENV)/installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; found $$($(PYTHON) --version). Set PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
