"""The two commands that people type: `nodewalld` and `nodewallctl`. Only these exit."""
