# Each target does its own set-up in .venv and can be run again: it goes on where it was.
#
#   make demo       sample images, pretraining on the CPU, export, vectors, one table
#   make test       lint, format, types, and the tests that take seconds
#   make test-slow  the tests that take minutes
#   make test-readers  bundles in torchvision, timm, fastembed, transformers; tables in LanceDB, datasets;
#                   runs in TensorBoard; maps by UMAP
#   make test-ray   `embed --cluster ray` with the real Ray, on this machine
#   make peers      an environment with lightly beside ours, in build/peers (see tests/peers)
#   make format     put the code into the form that `make test` wants
#   make lock       resolve requirements.lock anew (uses uv)
#   make clean      remove .venv and the tools' caches

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV := build/uv

# The first Python that the locked wheels exist for.
PYTHON := $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null \
	&& echo $$python && break; done)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-readers test-ray peers format lock clean

help:
	@sed -n '3,12s/^#   //p' Makefile

demo: $(STAMP)
	@$(BIN)/btpipe demo

test: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow" --numprocesses 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/pytest -m slow

# Shares what .venv has installed: torch alone is 6 GB.
peers: $(STAMP)
	@$(PYTHON) -m venv build/peers
	@printf '%s\n%s\n' "$(CURDIR)" \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		> "$$(build/peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	@build/peers/bin/pip install --quiet --no-deps lightly==1.6.0 lightly-utils==0.0.2

# Shares likewise. fastembed brings the onnxruntime for CPUs, which must not touch .venv's.
test-readers: $(STAMP)
	@$(PYTHON) -m venv build/readers
	@printf '%s\n%s\n' "$(CURDIR)" \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		> "$$(build/readers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	@build/readers/bin/pip install --quiet timm==1.0.31 transformers==5.24.0 fastembed==0.9.1 \
		datasets==5.2.0 lancedb==0.40.0 pylance==14.0.2 tensorboard==2.21.0 umap-learn==0.5.12
	HF_HUB_OFFLINE=1 build/readers/bin/python -m pytest tests/readers

# Shares likewise.
test-ray: $(STAMP)
	@$(PYTHON) -m venv build/ray
	@printf '%s\n%s\n' "$(CURDIR)" \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
		> "$$(build/ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	@build/ray/bin/pip install --quiet 'ray[data]==2.60.0'
	build/ray/bin/python -m pytest tests/cluster

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The stamp is written last, so that an interrupted install is taken up again. `pip` is run to see
# whether the environment works: it does not when it is half made or its folder was moved.
$(STAMP): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "btpipe needs Python 3.11 to 3.14 as python3 or python3.11 ...: install it" \
		"(Debian, Ubuntu: apt install python3 python3-venv)."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it" \
		"(Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	@command -v g++ >/dev/null || command -v clang++ >/dev/null || { echo "torch.compile needs a C++ compiler:" \
		"install g++ (Debian, Ubuntu: apt install g++)."; exit 1; }
	@$(BIN)/pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing what requirements.lock names into $(VENV): about 6 GB, some minutes the first time."
	@$(BIN)/pip install --quiet --require-hashes -r requirements.lock
	@$(BIN)/pip install --quiet --no-deps -e .
	@$(BIN)/pip check --quiet
	@touch $(STAMP)

# torch and torchvision are held at the pair that the tests ran with: raise both together.
lock:
	@test -x $(UV)/bin/uv || { $(PYTHON) -m venv $(UV) && $(UV)/bin/pip install --quiet uv; }
	@printf 'torch<=2.14.1\ntorchvision<=0.29.1\n' > $(UV)/caps.txt
	@$(UV)/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--upgrade --constraints $(UV)/caps.txt --no-annotate --no-header --no-emit-index-url \
		--no-emit-find-links --quiet --output-file $(UV)/requirements.txt
	@{ echo "# What pyproject.toml needs with [dev], pinned by version and hash. Made by: make lock"; \
		cat $(UV)/requirements.txt; } > requirements.lock

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache
