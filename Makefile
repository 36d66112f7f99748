# What a developer does in a day. Needs `pip install -e '.[test]'` and its environment active.
.PHONY: check test test-all test-gpu bench-gpu quickstart golden image image-lock format clean

check:
	ruff check .
	ruff format --check .
	mypy
	lint-imports

test:
	pytest

# The slow tests start ranks, hosts and clusters of their own, and measure: one after the other.
test-all: test
	pytest -n 0 -m "slow and not gpu" -o faulthandler_timeout=4000

# In several processes on one GPU: most of the time is compilation, on the CPU. Other files need packages that a machine
# with a GPU may lack.
test-gpu:
	pytest -n 8 --dist worksteal -m gpu --continue-on-collection-errors -o faulthandler_timeout=4000 \
		$$(grep -rlE 'mark\.gpu|every_device' tests --include='test_*.py')

# Results go to benchmarks/results/.
bench-gpu:
	python benchmarks/step.py --peers --width 2048 --tokens 8192 --dtype bf16 --repeats 9
	python benchmarks/phases.py --config configs/llama-1b.yaml --repeats 4 training.micro_batch_sequences=4 \
		training.global_batch_sequences=8
	python benchmarks/step.py --config configs/llama-1b.yaml --repeats 9
	python benchmarks/kernels.py --config configs/llama-1b.yaml
	python benchmarks/documents.py --config configs/llama-1b.yaml --repeats 9 training.micro_batch_sequences=4 \
		training.global_batch_sequences=8

quickstart:
	tritrain train configs/quickstart.yaml --ranks 2

# Read the difference before you commit it: each changed number is a changed result.
golden:
	TRITRAIN_UPDATE_GOLDEN=1 pytest -m "not gpu" -k golden
	git status --short tests/golden configs/schema.json docs/configuration-reference.md

image:
	docker build --file docker/Dockerfile --tag tritrain:cpu --build-arg REVISION=$$(git rev-parse HEAD) .

# The image's versions, the newest that pyproject.toml allows; needs uv. Left out are packages that are compiled, or
# chosen, for a kind of device, and what compiles them.
LOCK = uv pip compile --quiet --upgrade --config-file docker/uv.toml
image-lock:
	$(LOCK) docker/build.in -o docker/build.lock
	$(LOCK) pyproject.toml --extra eval --extra gguf --extra gs --extra s3 -o docker/requirements.lock \
		--no-emit-package deepspeed --no-emit-package setuptools --no-emit-package torch --no-emit-package torchvision
	grep -o 'deepspeed[^"]*' pyproject.toml | head -1 | $(LOCK) --no-deps - -o docker/deepspeed.lock

format:
	ruff check --fix .
	ruff format .

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find launcher model data quant eval tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +
