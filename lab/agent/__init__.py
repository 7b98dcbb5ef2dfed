"""The lab's hand inside a node: one process that opens sockets in all of its network namespaces.

Run within the node as `python -m lab.agent`: `serve` reads requests and prints answers, one JSON object a line;
`flood SPEC` sends numbered packets and counts what arrives. A socket belongs to the namespace in which it was made, so
one loop can be server and client at once. That is what makes the verdicts trustworthy: "timeout" is said only after
everything that the kernel has delivered has also been answered. Only the standard library is at hand (`python -S`),
so that it starts sooner.
"""
