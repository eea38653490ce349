# make quickstart   venv, games, cold start, RL with GCD, evaluation: from nothing to a table, on a laptop
# make test         venv, the whole test suite
# make repeat       the quickstart with 3 training seeds, with GCD and without
# make base         trains the tiny base model under assets/ anew
# make clean        forgets the games and runs that quickstart made
#
# DEVICE=cpu|cuda overrides what nvidia-smi says; RANKS is the number of processes, each with an engine of its own.

PYTHON ?= python3
DEVICE ?= $(shell nvidia-smi -L > /dev/null 2>&1 && echo cuda || echo cpu)
CORES := $(shell nproc 2> /dev/null || echo 1)
RANKS ?= $(if $(filter cpu,$(DEVICE)),$(if $(filter 1,$(CORES)),1,2),1)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
READY := .venv/ready-$(DEVICE)
RUN := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=$(RANKS)
SET := --set device=$(DEVICE)
GAMES := data/quickstart_games/made_games.json
BASE := runs/quickstart_base/eval.json
REPEATS := $(foreach seed,0 _1 _2,$(foreach kind,quickstart_sft quickstart_plain quickstart,runs/$(kind)$(seed:0=)))

.PHONY: quickstart test repeat base clean venv
.DELETE_ON_ERROR:
.SECONDARY:

quickstart: $(BASE) runs/quickstart_sft/eval.json runs/quickstart/eval.json
	@echo
	@$(BIN)/python evaluate.py --table runs/quickstart_base runs/quickstart_sft runs/quickstart
	@echo
	@$(BIN)/python report.py runs/quickstart
	@echo "success in percent [95 % interval]: the base model, after the cold start, after RL with GCD"
	@echo "files of the run: runs/quickstart (report.html, metrics.jsonl, tensorboard/, episodes/, checkpoints/)"

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

venv: $(READY)

# The CPU build of vLLM is installed without its dependencies, see requirements-cpu.txt. torch comes first and alone, so
# that nothing later brings CUDA packages; where TORCH_INDEX cannot be reached, the torch of pip's own index is used.
PROBE := import urllib.request as r; r.urlopen("$(TORCH_INDEX)/torch/", timeout=10)
$(READY): requirements.txt requirements-cpu.txt requirements-cpu-nodeps.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; use make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "error: no venv module; on Debian it is in the package python3-venv"; exit 1; }
ifeq ($(DEVICE),cpu)
	$(BIN)/pip install -q $$(grep '^torch==' requirements-cpu.txt) \
		$$($(PYTHON) -c '$(PROBE)' 2> /dev/null && echo --extra-index-url $(TORCH_INDEX))
	$(BIN)/pip install -q -r requirements-cpu.txt
	$(BIN)/pip install -q --no-deps -r requirements-cpu-nodeps.txt
else
	$(BIN)/pip install -q -r requirements.txt
endif
	@touch $@

$(GAMES): | $(READY)
	$(BIN)/python make_games.py --out data/quickstart_games --train 1500 --seen 300 --unseen 300 --seed 0 \
		--receptacles 6 --objects 12

$(BASE): $(GAMES)
	$(RUN) evaluate.py --ckpt assets/base --config configs/quickstart.yaml --out $(@D) --levels L0 --seeds 1 $(SET)

# The runs of one seed: $(1) ends their names, $(2) is the seed. train_rl.py resumes an interrupted run by itself.
define runs
runs/quickstart_sft$(1)/checkpoints/latest: | $(GAMES)
	$(RUN) train_sft.py configs/quickstart_sft.yaml $(SET) seed=$(2) name=quickstart_sft$(1)

runs/quickstart_sft$(1)/eval.json: | runs/quickstart_sft$(1)/checkpoints/latest
	$(RUN) evaluate.py --ckpt $$(firstword $$|) --config configs/quickstart.yaml --out $$(@D) $(SET)

runs/quickstart$(1)/eval.json runs/quickstart_plain$(1)/eval.json: runs/%$(1)/eval.json: \
		| runs/quickstart_sft$(1)/checkpoints/latest
	$(RUN) train_rl.py configs/$$*.yaml $(SET) seed=$(2) name=$$*$(1) model.path=$$(firstword $$|)
	$(RUN) evaluate.py --ckpt $$(@D)/checkpoints/latest $(SET)
endef
$(eval $(call runs,,0))
$(eval $(call runs,_1,1))
$(eval $(call runs,_2,2))

repeat: $(REPEATS:%=%/eval.json)
	@$(BIN)/python evaluate.py --table $(REPEATS)

base: $(READY)
	$(BIN)/python make_games.py --out data/base_games --train 6000 --seen 0 --unseen 0 --seed 1001 \
		--receptacles 6 --objects 12
	$(RUN) train_sft.py configs/base.yaml $(SET)
	$(RUN) train_sft.py configs/base_reading.yaml $(SET)
	mkdir -p assets/base && cp -L runs/base_reading/checkpoints/latest/* assets/base/

clean:
	rm -rf $(REPEATS) runs/quickstart_base data/quickstart_games data/sft
