"""The pure core: values and decisions. Nothing in this package touches files, processes, sockets or clocks."""
