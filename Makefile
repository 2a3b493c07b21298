# make demo: set up and run the whole way on this machine.  make demo-policy: then a policy that acts.
# make test: set up, lint and run the tests.  make test-fast: what one process can test, in minutes.  make docs: the site.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Of 44,000 modules few are ever imported, and Python compiles those when they first are.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-compile
# The tests start hundreds of processes: each would compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-policy test test-fast test-matrix docs lint format clean

$(VENV)/.installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) -e ".[sim,convert,zarr,ros,serve,dev]"
	touch $@

# What this environment has, for those who want it again: pip install -c constraints.txt .
.PHONY: constraints
constraints: $(VENV)/.installed
	{ echo "# Written by make constraints: $$($(BIN)/python -V), the versions that the tests last passed with."; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//'; } > constraints.txt

# Headless OpenGL for the simulators; a no-op where it is there or cannot be installed.
.PHONY: opengl
opengl:
	@ldconfig -p | grep -q libEGL.so || (command -v apt-get >/dev/null && test "$$(id -u)" = 0 && apt-get update -qq \
	  && apt-get install -y -qq --no-install-recommends libegl1 libgl1-mesa-dri) \
	  || echo "no libEGL: install it (Debian: libegl1 libgl1-mesa-dri) to simulate"

# ManiSkill beside the other simulators, and a Vulkan driver that can draw it where Debian's is too old.
.PHONY: maniskill
maniskill: $(VENV)/.installed
	$(BIN)/python -c "import mani_skill" 2>/dev/null || $(PIP_INSTALL) -e ".[maniskill]"
	sh data_tools/simulators/lavapipe.sh $(VENV)/share/lavapipe

# A real Slurm for tests/slurm, which say that they are skipped where it cannot be installed.
.PHONY: slurm
slurm: | opengl
	@{ command -v slurmctld && command -v munged && command -v slurmdbd && command -v mariadbd; } >/dev/null || (command -v apt-get >/dev/null && test "$$(id -u)" = 0 && apt-get update -qq \
	  && apt-get install -y -qq --no-install-recommends slurm-wlm slurmdbd mariadb-server munge iproute2) \
	  || echo "no Slurm: install it (Debian: slurm-wlm slurmdbd mariadb-server munge) to run tests/slurm"

# The whole way, small and real: simulate, shard, mix, train, kill, go on, measure. It prints each command that it runs.
STAMO := $(BIN)/stamo
demo: $(VENV)/.installed opengl
	$(STAMO) demo

# After `make demo`: one policy for four tasks, and how often it solves each, beside random actions and the expert.
demo-policy: $(VENV)/.installed opengl
	$(STAMO) demo --policy

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Three workers on two cores: tests/slurm mostly waits; what else runs beside what is in tests/conftest.py.
test:
	@$(MAKE) --no-print-directory -j 2 maniskill slurm
	@$(MAKE) --no-print-directory -j 2 lint docs
	$(BIN)/python -m pytest -n 3

# The daily loop: no simulator, no Slurm, no run of several processes.
test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow and not sim" -n 2

# The pages of docs/ and the API from the docstrings as a site in build/site; a broken link fails.
docs: $(VENV)/.installed
	$(BIN)/mkdocs build --quiet --strict
	@echo "the site is in build/site: open build/site/index.html"

# Every stage, strategy, kind and pair of options from start to end; hours, and another start goes on.
MATRIX ?= runs/matrix
test-matrix: $(VENV)/.installed
	PYTHONPATH=tests $(BIN)/python tests/journeys/matrix.py $(MATRIX)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo runs build .pytest_cache .mypy_cache .ruff_cache
