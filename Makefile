# `make demo` shows it, `make test` proves it, `make bench` measures it; each installs what it needs. Both work in throw-away network namespaces.

ready := .venv/ready
as_root := $(if $(filter 0,$(shell id -u)),,sudo)

.PHONY: demo test pictures bench bench-long neighbours war deb rpm clean

$(ready): pyproject.toml tools/prepare
	tools/prepare

demo: $(ready)
	$(as_root) .venv/bin/python -m demo $(DEMO)

test: $(ready)
	$(as_root) .venv/bin/python -m pytest $(TESTS)

# What nodewallctl prints, from real runs, for the README: docs/pictures; PICTURES="status plan" for some of them.
pictures: $(ready)
	tools/prepare pictures
	$(as_root) .venv/bin/python -m demo.pictures $(PICTURES)

# Some fifteen minutes on a quiet machine, kept in docs/; BENCH="--quick" and BENCH="--only hot,legacy" for a part of it.
bench: $(ready)
	$(as_root) .venv/bin/python -m bench $(BENCH)

# A hundred thousand foreign transactions: does anything grow?
bench-long: $(ready)
	$(as_root) .venv/bin/python -m bench --long $(BENCH)

# What other programs do to our rules, twenty times each, kept in docs/; NEIGHBOURS="--only dockerd --runs 5" for a part of it.
neighbours: $(ready)
	$(as_root) .venv/bin/python -m neighbours $(NEIGHBOURS)

# Ten minutes of each position beside Felix, by the real clock.
war: $(ready)
	$(as_root) .venv/bin/python -m neighbours --war 600

# Packages for every architecture, in dist/; the same commit gives the same bytes.
deb rpm: $(ready)
	tools/prepare-system build
	.venv/bin/python packaging/build.py $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
