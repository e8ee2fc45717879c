# Everything runs in the project's own .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types bench clean

demo: $(READY)
	$(BIN)/python -m edit_core demo
	$(BIN)/python tests/demo_comfyui.py

test: lint types
	$(BIN)/python -m pytest -c tests/pytest.ini tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch --editable '.[dev]'
	touch $@

# The README's table of speeds: both models at full size, 15 minutes and 8 GB on two cores.
bench: $(READY)
	mkdir -p docs
	$(BIN)/python -m edit_core bench --dtype bfloat16 --sizes 1024 --save docs/bench_cpu.json
	$(BIN)/python tests/tools/fill_readme.py

clean:
	rm -rf $(VENV) out
