"""How quick and how cheap nodewalld is, each figure beside its reference measured in the same run: `make bench`."""
