# `make demo` shows it, `make test` proves it; each installs what it needs. Both work in throw-away network namespaces.

ready := .venv/ready
as_root := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: demo test bench deb rpm clean

$(ready): pyproject.toml tools/prepare
	tools/prepare

demo: $(ready)
	$(as_root) .venv/bin/python -m demo $(DEMO)

test: $(ready)
	$(as_root) .venv/bin/python -m pytest $(TESTS)

# Figures beside their references, on a machine that does nothing else meanwhile.
bench: $(ready)
	$(as_root) .venv/bin/python -m bench --json docs/bench.json $(BENCH)

# Packages for every architecture, in dist/; the same commit gives the same bytes.
deb rpm: $(ready)
	tools/prepare-system build
	.venv/bin/python packaging/build.py $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
