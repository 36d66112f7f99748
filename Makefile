# What a developer does in a day. Needs `pip install -e '.[test]'` and its environment active.
.PHONY: check test test-all quickstart golden format clean

check:
	ruff check .
	ruff format --check .
	mypy
	lint-imports

test:
	pytest

test-all:
	pytest -m "not gpu"

quickstart:
	tritrain train configs/quickstart.yaml --ranks 2

# Read the difference before you commit it: each changed number is a changed result.
golden:
	TRITRAIN_UPDATE_GOLDEN=1 pytest -m "not gpu" -k golden
	git status --short tests/golden configs/schema.json

format:
	ruff check --fix .
	ruff format .

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find launcher model data quant eval tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +
