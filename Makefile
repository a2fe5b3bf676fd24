# Two commands matter: `make book` and `make test`. They need Python 3.11 or later and nothing else: everything is
# installed into .venv in the versions of constraints.txt, and what was done before is not done again.

.DEFAULT_GOAL := help
.PHONY: help book test html lab bench lint gpu nbval refresh clean distclean python
.NOTPARALLEL:

# The first Python on PATH that is new enough; or name one: make book PYTHON=/path/to/python3.12
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; break; fi; done)
endif
INSTALL = @$(PYTHON) -m tooling.install
RUN = @.venv/bin/python -m tooling

help:
	@echo 'make book     install, execute every chapter at quick scale, build the pages'
	@echo 'make test     install and test: units, notebooks, records, strict build, no external request'
	@echo 'make html     build the pages from the stored outputs, executing nothing'
	@echo 'make lab      open the chapters in Jupyter'
	@echo 'make bench    speed beside other implementations'
	@echo 'make lint     ruff and mypy'
	@echo 'make gpu      every chapter at standard scale on CUDA (records in runs/)'
	@echo 'make nbval    execute the notebooks anew and compare their checked outputs'
	@echo 'make refresh  execute everything; write the committed notebooks and quick records'
	@echo 'make clean    remove what was built; make distclean: the environment too'

book: python
	$(INSTALL) book
	$(RUN) book

test: python
	$(INSTALL) test
	$(RUN) test

html: python
	$(INSTALL) book
	$(RUN) html

lab: python
	$(INSTALL) jupyter
	$(RUN) lab

bench: python
	$(INSTALL) bench
	$(RUN) bench

lint: python
	$(INSTALL) lint test
	$(RUN) lint

gpu: python
	$(INSTALL) book hf data
	$(RUN) gpu

nbval: python
	$(INSTALL) test
	$(RUN) nbval

refresh: python
	$(INSTALL) book
	$(RUN) refresh

clean:
	rm -rf _build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find papercore tooling tests book -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv

python:
ifeq ($(strip $(PYTHON)),)
	@echo 'papercore needs Python 3.11 or later, and none was found: python3 on PATH is' \
	  "$$(python3 --version 2>/dev/null || echo missing)." >&2
	@echo 'Install a newer one, or name it: make book PYTHON=/path/to/python3.12' >&2
	@exit 1
endif
