# `make demo` shows it, `make test` proves it; each installs what it needs. Both work in throw-away network namespaces.

ready := .venv/ready
as_root := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: demo test clean

$(ready): pyproject.toml tools/prepare
	tools/prepare

demo: $(ready)
	$(as_root) .venv/bin/python -m demo $(DEMO)

test: $(ready)
	$(as_root) .venv/bin/python -m pytest $(TESTS)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
