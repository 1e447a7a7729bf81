# make paper   installs everything, runs the embedded default, leaves figures, tables and the paper
# make test    installs everything, runs the tests (under half an hour on two cores; make test-all: also what takes longer)
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Not by itself: the first line of a script that pip writes does not stand every name of the checkout's folder.
NBDEV := $(BIN)/python $(BIN)/nbdev
READY := $(VENV)/.ready
RUN ?= smoke
PRESET ?= smoke
# The value of a variable as one word of the shell, whatever is in it; $(value ...): a $ in it is no make variable.
quoted = '$(subst ','\'',$(value $(1)))'
# extra arguments for the runner, for example ARGS="-p seed=3"
ARGS ?=
export PYTHONDONTWRITEBYTECODE := 1
# How OpenMP's threads wait: spinning for a tenth of a millisecond, then asleep (nbs/base/07_environment.ipynb).
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 3000

.PHONY: help paper figures run list lab test test-all everything proofs planted export clean-notebooks install hooks docs errors bench clean gpu-check

help:
	@echo "make paper [RUN=name]                  run the embedded default (or take the run NAME) and make its paper"
	@echo "make test                              the tests, under half an hour on two cores"
	@echo "make test-all                          also what takes longer; the log goes to docs/test-all.log"
	@echo "make proofs                            intervals, processes, killed runs, the gradient by enumeration (long)"
	@echo "make planted                           bugs planted one at a time, each of which the tests must catch (an hour)"
	@echo "make run PRESET=name [DATA=file] [RUN=name] [ARGS=\"-p name=value\"]"
	@echo "make lab                               the notebooks in JupyterLab"
	@echo "make bench                             training and sampling beside TRL's and transformers' own, on this machine"
	@echo "make figures                           figures, tables and the published paper from committed results"
	@echo "make gpu-check                         each path that wants a GPU, on one, in ten minutes; the table is for the README"
	@echo "make list                              the runs with status, time and headline numbers"
	@echo "make export                            notebooks -> grpo_engage/"
	@echo "make docs                              the documentation as HTML in _docs/, every link followed"
	@echo "make errors                            docs/errors.md, from the messages that tests provoke"
	@echo "More: .venv/bin/python -m grpo_engage --help"

install: $(READY)

# The stamp comes last: an installation that was cut off is taken up again.
$(READY): requirements.lock settings.ini setup.py
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Python 3.11 is needed (the lock file is made for it); found $$("$(PYTHON)" --version). Name another with PYTHON=path."; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' || { echo "This Python cannot make virtual environments. On Debian: apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/pip || "$(PYTHON)" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python hooks/clean_notebook.py --install
	touch $@

# Outputs of notebooks stay out of commits: a filter in this checkout's own git settings, and nothing outside it.
hooks: $(READY)
	$(BIN)/python hooks/clean_notebook.py --install

paper: $(READY)
ifeq ($(RUN),smoke)
	$(BIN)/python -m grpo_engage run --preset smoke --publish $(ARGS)
else
	$(BIN)/python -m grpo_engage paper --run=$(call quoted,RUN)
endif

run: $(READY)
	$(BIN)/python -m grpo_engage run --preset=$(call quoted,PRESET) $(if $(value DATA),--data=$(call quoted,DATA)) \
		$(if $(filter-out smoke,$(value RUN)),--run=$(call quoted,RUN)) $(ARGS)

# The README's figures, the studies' tables and the published paper from the committed results, without a model
figures: $(READY)
	$(BIN)/python benchmarks/figures.py

list: $(READY)
	$(BIN)/python -m grpo_engage list

lab: $(READY)
	$(BIN)/python -m jupyterlab --notebook-dir=. --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter --LabApp.app_settings_dir=hooks/lab nbs/10_runs.ipynb $(ARGS)

export: $(READY)
	find grpo_engage -name "*.py" ! -name __init__.py -delete
	$(NBDEV)_export
	$(BIN)/python -m grpo_engage.run.settings  # writes the parameters cells

clean-notebooks: $(READY)
	$(BIN)/python hooks/clean_notebook.py nbs

# The pages and the API from docstrings as HTML in _docs/; fails where a link leads nowhere (tests/test_docs.py does it too).
docs: $(READY)
	$(BIN)/python docs/build.py

# docs/errors.md from the messages that tests provoke and docs/errors.yaml; says what an entry is missing for
errors: $(READY)
	$(BIN)/python docs/errors.py

# Order: what is quick to fail first; pytest last, its longest files first (tests/conftest.py). Two processes of one thread
# each: small models gain little from a second thread. `nano` is built beforehand, with all cores, so that no two processes
# build it at once.
define checks
	$(BIN)/ruff check .
	$(BIN)/python -c 'from grpo_engage.policy.base_models import ensure_policy; ensure_policy("nano")'
	OMP_NUM_THREADS=1 $(NBDEV)_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 $(1)
endef

# Under half an hour on two cores, whatever is added: what takes longer gets the mark `slow` and runs in test-all.
test: $(READY)
	$(call checks,-m "not slow")

# Every test, and the proofs that take minutes: the coverage of the intervals, which must come out as committed, and two
# processes against one. Its last log is committed, without the paths of the machine.
test-all: $(READY)
	mkdir -p outputs
	set -o pipefail; $(MAKE) --no-print-directory everything 2>&1 | $(BIN)/python -uc 'import os, sys; [sys.stdout.buffer.write(line.replace(os.getcwdb(), b".")) for line in sys.stdin.buffer]' | tee outputs/test-all.log
	cp outputs/test-all.log docs/test-all.log

everything: $(READY)
	mkdir -p outputs
	@echo "commit $$(git rev-parse --short HEAD), $$(date -u +%F), $$(nproc) cores"
	$(call checks,)
	$(BIN)/python proofs/coverage.py --out outputs/coverage.csv
	cmp outputs/coverage.csv proofs/coverage.csv
	$(BIN)/python proofs/processes.py --out outputs/processes.csv
	@echo "all passed"

# The coverage of the intervals and two processes against one, also with weights in pieces (a minute each), kill -9 at random moments (half an hour),
# then the trainer's gradient by enumeration (long); leaves proofs/*.csv
proofs: $(READY)
	$(BIN)/python proofs/coverage.py
	$(BIN)/python proofs/processes.py
	$(BIN)/python proofs/pieces.py
	$(BIN)/python proofs/survival.py
	$(BIN)/python proofs/gradient.py

# Bugs planted one at a time in a copy of the checkout; fails where the tests do not notice one; leaves proofs/planted_results.csv
planted: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python proofs/planted.py $(ARGS)

# A step and sampling beside TRL's and transformers' own, in turn on this machine; leaves outputs/speed.csv (half an hour;
# with smaller models, sizes or fewer kinds by ARGS, see benchmarks/speed.py)
bench: $(READY)
	mkdir -p outputs
	$(BIN)/python benchmarks/speed.py outputs/speed.csv $(ARGS)

# What only a GPU can show (docs/gpu.md); leaves outputs/gpu-check/: checks.csv, speed.csv, table.md. ARGS="--tiny": the same
# code without a GPU
gpu-check: $(READY)
	$(BIN)/python benchmarks/gpu_check.py outputs/gpu-check $(ARGS)

clean:
	rm -rf outputs/runs paper/figures paper/tables paper/macros.tex paper/main.pdf
