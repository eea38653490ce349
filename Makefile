# make quickstart   from nothing to a table, on a laptop: quickstart.sh
# make test         the whole test suite
# make table1       Table 1 in miniature: every method with GCD and without, 3 to 8 seeds each; 30 hours on 2 cores
# make base         trains the tiny base model under assets/ anew
# make clean        forgets the games and runs that quickstart made
#
# DEVICE, RANKS, PYTHON and TORCH_INDEX: see quickstart.sh and install.sh.

.PHONY: quickstart test table1 base clean venv
RUN := OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc_per_node=$(or $(RANKS),2)
TINY := data/tiny_base_model

quickstart:
	./quickstart.sh

test: venv
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

venv:
	./install.sh

table1: venv
	.venv/bin/python tools/make_games.py --out data/lab_games --train 1500 --seen 1350 --unseen 2700 --seed 2 \
		--receptacles 6 --objects 12
	.venv/bin/python paper/table1.py

base: venv
	.venv/bin/python tools/make_games.py --out $(TINY)/games --train 6000 --seen 0 --unseen 0 --seed 1001 \
		--receptacles 6 --objects 12
	.venv/bin/python tools/tiny_base_model.py rows configs/tiny_base_model.yaml --out $(TINY)/rows.jsonl
	.venv/bin/python tools/tiny_base_model.py init --rows $(TINY)/rows.jsonl --out $(TINY)/start --seed 1
	$(RUN) train_sft.py configs/tiny_base_model.yaml
	.venv/bin/python tools/tiny_base_model.py rows configs/tiny_base_model_reading.yaml --out $(TINY)/reading.jsonl
	$(RUN) train_sft.py configs/tiny_base_model_reading.yaml
	mkdir -p assets/base && find -L runs/tiny_base_model_reading/checkpoints/latest -maxdepth 1 -type f \
		! -name guidelines.json -exec cp {} assets/base/ \;

clean:
	rm -rf runs/quickstart* data/quickstart_games data/sft
