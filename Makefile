# make demo, make test and make check set up .venv by themselves; Python 3.11+, pip and make suffice.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

DEMO := examples/carrow_point.md --max-new-tokens 24 \
	-q "Who was the architect of the tower?" \
	-q "What was the combination of the oil store's lock?" \
	-q "What was the supply boat called?" \
	-q "What was the colour of the fog-signal house door?" \
	-q "What was the telegraph code word of the station?" \
	-q "What was the ring number of the oldest petrel?"

.PHONY: demo test test-fast test-gpu check format bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)
	@echo "== sketch: every key is kept, far from the model, and found again when it matters =="
	@$(BIN)/nearfar qa $(DEMO) --policy sketch
	@echo "== streaming-llm: as many keys as sketch reads, but only the most recent ones =="
	@$(BIN)/nearfar qa $(DEMO) --policy streaming-llm

# two processes of one thread each; what is left over in one goes to the other
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test: $(STAMP)
	$(PYTEST) --durations 25

# without what takes seconds, the built-in model, and the policies that have a like among the rest
test-fast: $(STAMP)
	$(PYTEST) -m "not slow and not model and not alike"

# kernels and policies compiled for the GPU that is here; the Python that runs it has torch for it
test-gpu:
	NEARFAR_TEST_DEVICE=cuda $(PYTHON) -m pytest tests/gpu_kernels tests/runtime/steps/gpu \
		tests/policies/test_contract.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/architecture

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python benchmarks/against_transformers.py
	$(BIN)/nearfar bench host
	$(BIN)/nearfar bench host --shape smollm2-135m --context 16384 --budget 1024
	$(BIN)/python benchmarks/harness.py
	$(BIN)/python benchmarks/saved_documents.py

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
