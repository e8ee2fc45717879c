# Everything runs in the project's own .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

NOT_SLOW := -m 'not slow'

.PHONY: demo test test-all lint types bench bench-kernels profile bench-training world screens kills faults fuzz \
	matrix soak neighbours mutants lock clean

demo: $(READY)
	$(BIN)/python -m edit_core demo
	$(BIN)/python tests/demo_comfyui.py

# Some ten minutes on two cores; `make test-all` also runs what is marked slow (browsers, soaks, long fuzzing, …).
test: lint types
	$(BIN)/python -m pytest -c tests/pytest.ini -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(NOT_SLOW) tests

test-all: NOT_SLOW :=
test-all: test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The nodes import `..edit_core`, so they are looked at from outside of the pack, as ComfyUI does.
types: $(READY)
	$(BIN)/mypy
	mkdir -p .mypy_cache/outside
	ln -sfn ../.. .mypy_cache/outside/edit_pack
	MYPYPATH=.mypy_cache/outside $(BIN)/mypy --package edit_pack.nodes

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch --editable '.[dev]'
	touch $@

# The README's table of speeds: both models at full width, half an hour and 8 GB on two cores.
bench: $(READY)
	mkdir -p docs
	$(BIN)/python -m edit_core bench --preset readme --verify --save docs/bench_cpu.json --plot docs/bench_cpu.png
	$(BIN)/python tools/fill_readme.py

# Which Triton kernels win on this machine's CUDA device; remembered in the user's cache, where sampling looks them up.
bench-kernels: $(READY)
	$(BIN)/python -m edit_core.bench.kernels

# docs/profile.md: where the time of a step goes, ten minutes and 6 GB on two cores.
profile: $(READY)
	$(BIN)/python tools/profile_step.py

# What a training costs, at the real models' width, for docs/training.md: half an hour and 16 GB on two cores.
bench-training: $(READY)
	$(BIN)/python tools/bench_engine.py
	$(BIN)/python tools/fill_readme.py

# The small world's table: trains and judges every student that docs/world.json lacks; half an hour each on one core.
world: $(READY)
	$(BIN)/python tools/world table --backbone pixart_sigma
	$(BIN)/python tools/world table --backbone sd35_medium
	$(BIN)/python tools/fill_readme.py

# docs/screens and the pictures of the help pages, with a ComfyUI and a Chromium; minutes on two cores.
screens: $(READY)
	$(BIN)/python tools/make_screens.py

# Twenty kills of a training of each backbone at random moments; `make test` has two of one.
kills: $(READY)
	EDIT_TEST_KILLS=20 $(BIN)/python -m pytest -c tests/pytest.ini tests/test_distill.py -k random_moments

# What docs/reliability.md tells of faults, numbers and broken files; half an hour on two cores.
faults: $(READY)
	EDIT_TEST_KILLS=20 $(BIN)/python tools/reliability.py faults
	$(BIN)/python tools/reliability.py numbers
	$(BIN)/python tools/reliability.py hostile

# So many mutated files, for docs/reliability.md; ten minutes on two cores.
FUZZ_COUNT ?= 200000
fuzz: $(READY)
	$(BIN)/python tools/reliability.py fuzz $(FUZZ_COUNT)

# Do the tests notice mistakes? Tries mutants for so long, on one core, and goes on where it ended, for
# docs/reliability.md. The tests run in a copy of the repository.
MINUTES ?= 45
mutants: $(READY)
	$(BIN)/python tools/mutants.py --minutes $(MINUTES)

# One complete set of versions with digests, for Linux, macOS and Windows.
lock: $(READY)
	$(BIN)/uv pip compile pyproject.toml --quiet --extra dev --constraint constraints.txt --python-version 3.10 \
		--universal --generate-hashes --no-header --no-annotate --output-file requirements.lock

# What docs/reliability-comfyui.md says: EDiT beside other nodes, and 500 prompts on one server, in every ComfyUI found.
matrix soak: $(READY)
	EDIT_TEST_RECORD=docs $(BIN)/python -m pytest -c tests/pytest.ini tests/test_$@_comfyui.py
	$(BIN)/python tools/reliability_comfyui.py

# docs/neighbours.md: diffusers' own hooks and helpers beside EDiT; minutes. What is not installed is said in the table.
neighbours: $(READY)
	$(BIN)/python tools/neighbours.py

clean:
	rm -rf $(VENV) out
