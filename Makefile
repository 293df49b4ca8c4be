# The verbs of development; .ci/run uses them too. Tools come from .venv, which `make build` makes.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
PYTHON := python3
MODEL := ../shared/models/smollm2-135m-phi3-q4_k_m.gguf
TEXT := ../shared/golden/gpl-3-head.txt
LONG_TEXT := /usr/share/common-licenses/GPL-3

.PHONY: build test lint check-c check-threads check-emulated check-qemu check-targets check-baseline check-arm64 \
	check-workflows check-wheel bench accuracy vocabularies goldens clean

build: .venv  # compile the extension in place
	pip install --quiet --group test --group lint --editable .

.venv:
	python3 -m venv .venv
	pip install --quiet --upgrade pip

test:
	python -m pytest

lint:
	ruff check .
	ruff format --check .
	mypy
	cython-lint src
	clang-format --dry-run -Werror $(shell find csrc tests/c -name '*.[ch]')

check-c:  # csrc without Python: warnings are errors, sanitizers on
	python3 tests/c/check.py

check-threads:  # the thread pool under the thread sanitizer
	python3 tests/c/check.py --threads

check-emulated:  # the kernels for AVX-VNNI and AVX-512 where there is AVX2 only: their intrinsics emulated in C
	python3 tests/c/check.py --emulate

check-qemu:  # the checker on emulated x86-64 and ARM processors, old and new
	python3 tests/c/check.py --qemu

check-targets: .venv  # csrc for Windows, macOS and musl by zig cc; run in Wine and QEMU where they are
	pip install --quiet ziglang
	python tests/c/check_targets.py

check-baseline:  # the built x86-64 extension: only files named by an instruction set go beyond the baseline
	python3 tests/c/check_baseline.py src/phi3c/_kernels.*.so

check-arm64: .venv  # the package in an emulated ARM Debian, on the demo model: same text, same logits; needs root
	pip install --quiet --editable . cython 'setuptools>=77'
	tests/check_arm64.sh

goldens: .venv  # tests/golden anew, from transformers; LONG_TEXT has 3500 tokens or more
	pip install --quiet --group golden
	python tests/make_goldens.py --model $(MODEL) --text $(LONG_TEXT)

check-workflows:  # the workflows, pyproject.toml, and that cibuildwheel makes the wheels that docs/releasing.md lists
	actionlint .github/workflows/*.yml
	check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	validate-pyproject pyproject.toml
	python .ci/check_wheels.py

check-wheel:  # install this checkout for one Python and test it there: make check-wheel PYTHON=python3.14t
	.ci/test-wheel $(PYTHON) .

bench:  # speed of the demo model, beside what the machine allows
	phi3c bench demo

accuracy:  # against the float32 forward pass: make accuracy MODEL=model.gguf TEXT=text.txt
	python benchmarks/accuracy.py $(MODEL) --text $(TEXT)

vocabularies:  # tokenizers of Phi-4 and Phi-4-mini at full size (41 MB to download) against tiktoken and Hugging Face
	pip install --quiet tiktoken
	pip download --quiet --no-deps --dest build litellm==1.109.1
	python benchmarks/vocabularies.py build/litellm-*.whl

clean:
	rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f src/phi3c/*.so
	find src tests benchmarks -name __pycache__ -exec rm -r {} +
