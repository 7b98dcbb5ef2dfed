"""Throw-away nodes in Linux namespaces, for the tests and the demo: real kernel, real tools, real packets.

`node` builds the machines and `layout` their network; `traffic` sends packets through them and says what became of
them, `flood` thousands a second; `daemon` runs nodewalld inside one, and `agent` is the lab's hand within a node (a
program of its own).
Nothing here touches the machine's own network: whatever is made dies with its node.
"""
