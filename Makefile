# One command per purpose; CI and the README use the same. `make` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SERVE  := $(VENV)/.serve
DEV    := $(VENV)/.dev
PEERS  := $(VENV)/.peers
ARGS   ?=
JOBS   ?= 2

.PHONY: help serve test test-newest test-compose train bench chaos soak simulate fuzz mutants conformance sbom lint format lock clients proto clean
help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

serve: $(SERVE) ## start the service on :8000 (ARGS="--port 9000" for another flag)
	@exec $(BIN)/python -m service serve $(ARGS)

test: $(DEV) ## run every test (ARGS="tests/service -x" for some, JOBS=0 for one process)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

# The bounds of pyproject.toml are left out, so that a release beyond them that breaks us is known before it is allowed.
NEWEST := $(VENV)/newest
WITHOUT_BOUNDS := import re, tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  needs = sum(project["optional-dependencies"].values(), project["dependencies"]); \
  print(*(re.sub("^([^<>=;]+)[<>=][^;]*", r"\1", need) for need in needs if "model-service" not in need), sep="\n")
test-newest: $(VENV)/bin/python ## run the contract tests with the newest release of everything; to be scheduled weekly
	$(BIN)/python -m venv $(NEWEST)
	$(BIN)/python -c '$(WITHOUT_BOUNDS)' >$(NEWEST)/requirements.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
	  -r $(NEWEST)/requirements.txt
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	-$(NEWEST)/bin/python -m pip check  # names the bounds that are exceeded
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n $(JOBS) tests/contract $(ARGS)

test-compose: $(DEV) ## build the images and run them; needs Docker, and is skipped without
	$(BIN)/python -m pytest tests/compose -rP $(ARGS)

train: $(DEV) ## train, prove and publish every model as its next version
	$(BIN)/python -m training --all $(ARGS)

bench: $(PEERS) ## measure against other servers (ARGS=--quick for two minutes)
	$(BIN)/python -m benchmarks $(ARGS)

chaos: $(DEV) ## a minute of load, kills, hostile models and requests (ARGS="--seconds 600" for more)
	$(BIN)/python -m tests.chaos $(ARGS)

soak: $(DEV) ## minutes of load with kills and reloads; nothing may be lost or grow
	$(BIN)/python -m tests.soak $(ARGS)

simulate: $(DEV) ## a million seeds of crashes and faults on a simulated clock (ARGS="engine --replay 7" for one)
	$(BIN)/python -m tests.simulation $(or $(ARGS),--times 40)

fuzz: $(DEV) ## ten minutes by coverage, and ten of requests from the API's own description
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz.by_coverage $(ARGS)
	$(BIN)/python -m tests.fuzz $(ARGS)

mutants: $(DEV) ## change the core's code in many places, and count what its tests notice (ARGS="--sample 20")
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(ARGS)

conformance: $(DEV) ## HTTP/1.1 by the byte, of this and every other server that is installed
	$(BIN)/python -m tests.conformance $(ARGS)

sbom: $(DEV) ## a bill of materials (CycloneDX) of what the images install, by name and hash
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'cyclonedx-bom>=7,<8'
	@mkdir -p build
	for image in '' -gpu -train; do $(BIN)/cyclonedx-py requirements deploy/requirements$$image.lock \
	  --pyproject pyproject.toml --output-reproducible --output-file build/sbom$$image.json || exit; done

lint: $(DEV) ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(DEV) ## format and mend what lint can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# PyTorch's CPU builds come from its own index.
LOCK = $(BIN)/uv pip compile --quiet --python-version 3.11 --python-platform linux --no-annotate \
  --custom-compile-command 'make lock' pyproject.toml
WITH_TORCH = --generate-hashes --upgrade --extra-index-url https://download.pytorch.org/whl/cpu \
  --index-strategy unsafe-best-match
lock: $(DEV) ## pin anew what the images install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(LOCK) --generate-hashes --upgrade --output-file deploy/requirements.lock
	$(LOCK) --extra grpc --generate-hashes --upgrade --constraint deploy/requirements.lock \
	  --output-file deploy/requirements-grpc.lock
	echo 'onnxruntime; sys_platform == "never"' >$(VENV)/overrides  # the GPU's package writes the same files
	echo 'onnxruntime-gpu[cuda,cudnn]' | $(LOCK) - --generate-hashes --upgrade --constraint deploy/requirements.lock \
	  --override $(VENV)/overrides --output-file deploy/requirements-gpu.lock
	$(LOCK) --extra train $(WITH_TORCH) --constraint deploy/requirements.lock --output-file deploy/requirements-train.lock
	$(LOCK) --extra torch $(WITH_TORCH) --constraint deploy/requirements-train.lock --output-file deploy/requirements-torch.lock

# Clients that pin packages older than ours, perf_analyzer with the two libraries that it leaves out, and those of npm.
CLIENTS := kserve==0.21.0 mlserver==1.7.1 nvidia-pytriton==0.7.0 tritonclient==2.51.0
NPM_CLIENTS := @redocly/cli@2 @stoplight/spectral-cli@6 openapi-fetch@0.17 openapi-typescript@7 typescript@5
clients: $(DEV) ## install clients of other makers, each beside our environment, for their tests
	for client in $(CLIENTS); do $(PYTHON) -m venv $(VENV)/$${client%%==*} && \
	  $(VENV)/$${client%%==*}/bin/pip install --quiet --disable-pip-version-check $$client || exit; done
	$(VENV)/tritonclient/bin/pip install --quiet --disable-pip-version-check 'nvidia-cuda-runtime-cu12<13'
	-cd $(VENV)/tritonclient && apt-get download --quiet libb64-0d && dpkg --extract libb64-0d_*.deb .
	-npm install --prefix $(VENV)/npm --silent --no-audit --no-fund --ignore-scripts --legacy-peer-deps $(NPM_CLIENTS)

proto: $(DEV) ## compile the messages of gRPC
	$(BIN)/python -m grpc_tools.protoc -I service/grpc --descriptor_set_out=service/grpc/open_inference.binpb \
	  service/grpc/open_inference.proto

clean: ## remove the environment and every cache
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* build *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; run: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(SERVE): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(PEERS): benchmarks/requirements.txt | $(DEV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $< || \
	  echo "not every other server could be installed; those that are will be measured" >&2
	@touch $@

$(DEV): pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(SERVE)
