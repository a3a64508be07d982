# make demo   the main job, from a checkpoint to a comparison table
# make test   the tests, two at once (JOBS=4: four); ARGS="-k name" chooses, and runs one after the other
# make accept write tests/data/launches.md and docs/commands.md as they are now (look at the difference)
# make lint   ruff and pyright
# make pins   resolve requirements/*.in anew
# make clean  remove .venv, caches and build leftovers (artifacts and measurements stay)
# Each makes .venv first where it is missing or old. PYTHON names the Python to make it with.

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin

.PHONY: demo test accept lint environment pins clean

demo: environment
	@tools/demo.sh

test: environment
	$(BIN)/python -m pytest $(or $(ARGS),-n $(JOBS))

accept: environment
	MMQ_ACCEPT=1 $(BIN)/python -m pytest -q tests/test_snapshots.py tests/test_commands_page.py

lint: environment
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

environment:
	@$(PYTHON) tools/bootstrap.py

pins:
	@$(PYTHON) tools/pin.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
