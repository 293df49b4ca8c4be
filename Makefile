# Everything CI does is one of these verbs or a line of .ci/run. They use .venv and make it where it is missing.
BIN := .venv/bin/
MODEL := ../shared/models/smollm2-135m-phi3-q4_k_m.gguf
TEXT := ../shared/golden/gpl-3-head.txt

.PHONY: build test lint check-c bench accuracy clean

build: .venv  # compile the extension in place
	$(BIN)pip install --quiet --group test --group lint --editable .

.venv:
	python3 -m venv .venv
	$(BIN)pip install --quiet --upgrade pip

test:
	$(BIN)python -m pytest

lint:
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)mypy
	$(BIN)stubtest phi3c._kernels
	$(BIN)cython-lint src
	$(BIN)clang-format --dry-run -Werror $(shell find csrc tests/c -name '*.[ch]')

check-c:  # csrc without Python: warnings are errors, sanitizers on
	python3 tests/c/check.py

bench:  # one greedy answer of the demo model, with its speed
	$(BIN)phi3c run -m demo --temperature 0 --max-tokens 128 --stats "Write a short story about the sea."

accuracy:  # against the float32 forward pass: make accuracy MODEL=model.gguf TEXT=text.txt
	$(BIN)python benchmarks/accuracy.py $(MODEL) --text $(TEXT)

clean:
	rm -rf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f src/phi3c/*.so
	find src tests benchmarks -name __pycache__ -exec rm -r {} +
