# `make demo` and `make test` work on a bare machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs install glyph siblings clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/erasure demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The documentation site, in build/site.
docs: install
	$(BIN)/mkdocs build --strict

# Every file of the embedded checkpoint again, from nothing: hours on two cores, minutes on a GPU.
glyph: install
	$(BIN)/python -m pip install --quiet -e ".[glyph]"
	$(BIN)/python -m erasure.glyph.build.art
	$(BIN)/python -m erasure.glyph.build.train_clip
	$(BIN)/python -m erasure.glyph.build.train_vae
	$(BIN)/python -m erasure.glyph.build.train_vae --decoder-only
	$(BIN)/python -m erasure.glyph.build.train_classifier
	$(BIN)/python -m erasure.glyph.build.train_unet
	$(BIN)/python -m erasure.glyph.build.export
	$(BIN)/python -m erasure.glyph.build.train_quality
	$(BIN)/python -m erasure.glyph.build.check

# The transformer siblings of glyph (glyph-mmdit is shipped half trained, glyph-dit not yet), from its shipped parts; resumable: hours on two cores.
siblings: install
	$(BIN)/python -m pip install --quiet -e ".[glyph]"
	$(BIN)/python -m erasure.glyph.build.train_t5
	$(BIN)/python -m erasure.glyph.build.train_dit
	$(BIN)/python -m erasure.glyph.build.train_mmdit

clean:
	rm -rf build $(VENV) *.egg-info
