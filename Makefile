# make demo   a small data set, packed, trained on through DALI, and what came out (demo/); SEED=1 takes another
# make test   the tests that take seconds; make test-slow, the others
# make transfer   pre-training, frozen evaluation and a detector on generated scenes (demo/transfer/)
# make ffcv   compiles FFCV into .venv, once its headers are there
# They create .venv on first use; PYTHON=python3.12 chooses another interpreter (3.10 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
APT := apt-get install g++ pkg-config python3-dev libopencv-dev libturbojpeg0-dev
HEADERS = pkg-config --exists opencv4 libturbojpeg && command -v c++ >/dev/null
FFCV = $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ffcv]'
SEED ?= 0

.PHONY: demo transfer test test-slow ffcv lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "make: inscon needs Python 3.10 to 3.13; found: $$($(PYTHON) --version 2>&1). Set PYTHON=python3.12, say."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "make: $(PYTHON) has no venv module; on Debian or Ubuntu: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dali,tensorboard,dev]'
	@# FFCV has no wheels: it is compiled against Debian's OpenCV and libjpeg-turbo. Everything else works without it.
	@{ $(HEADERS) && $(FFCV); } || echo "make: going on without FFCV; for it: $(APT), then make ffcv"
	@touch $@

ffcv: $(VENV)/.installed
	@$(HEADERS) || { echo "make: FFCV is compiled and needs what it is compiled against: $(APT)"; exit 1; }
	$(FFCV)

demo: $(VENV)/.installed
	rm -rf demo
	$(BIN)/python scripts/demo.py --out demo --seed $(SEED)
	$(BIN)/python scripts/throughput_report.py --run demo/run
	$(BIN)/python scripts/throughput_report.py --recipe demo --pipeline dali --data demo/train --steps 10 --out demo/report \
	  --html demo/report.html --run demo/run

transfer: $(VENV)/.installed
	rm -rf demo/transfer
	$(BIN)/python benchmarks/transfer.py --out demo/transfer

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) demo build *.egg-info
