PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
export HF_HUB_OFFLINE ?= 1
export HF_DATASETS_OFFLINE ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup run test soak bench readme lock

setup: $(READY)

$(READY): requirements.lock requirements-nodeps.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-nodeps.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	touch $(READY)

run: setup
	$(BIN)/so8t run configs/smol.yaml

test: setup
	$(BIN)/ruff check .
	$(BIN)/nbdev-test --n-workers 2
	$(BIN)/pytest -n 2

soak: setup
	$(BIN)/pytest -m soak -s

bench: setup
	for f in nbs/bench/*.ipynb; do $(BIN)/jupyter nbconvert --to notebook --execute --inplace "$$f" && $(BIN)/nbdev-clean --fname "$$f"; done

readme: setup
	$(BIN)/python .ci/readme.py

# torch brings its own CUDA packages where it needs them; they are left to it
CUDA := cuda-bindings cuda-pathfinder cuda-toolkit triton $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc cuda-runtime \
	cudnn-cu13 cufft cufile curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)

LOCKED := train data eval ops serve screen media lab dev
lock:
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml $(addprefix --extra ,$(LOCKED)) --universal --python-version 3.11 --no-annotate --upgrade --quiet \
		--custom-compile-command "make lock" $(addprefix --no-emit-package ,$(CUDA)) --output-file requirements.lock
