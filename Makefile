# The verbs of development; .ci/run uses them too. Tools come from .venv, which `make build` makes.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
MODEL := ../shared/models/smollm2-135m-phi3-q4_k_m.gguf
TEXT := ../shared/golden/gpl-3-head.txt

.PHONY: build test lint check-c check-avx512 bench accuracy clean

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

check-avx512:  # the AVX-512 kernels where there is AVX2 only: their intrinsics emulated in C
	python3 tests/c/check.py --emulate-avx512

bench:  # speed of the demo model, beside what the machine allows
	phi3c bench demo

accuracy:  # against the float32 forward pass: make accuracy MODEL=model.gguf TEXT=text.txt
	python benchmarks/accuracy.py $(MODEL) --text $(TEXT)

clean:
	rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f src/phi3c/*.so
	find src tests benchmarks -name __pycache__ -exec rm -r {} +
