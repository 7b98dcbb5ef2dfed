"""Measures what other programs do to our rules, in throw-away nodes: `make neighbours`, kept in docs/neighbours.md.

`actions` is the table of programs and of what each of them does, for whoever wants to disturb rules as the world does;
`measure` tries one of them under a flood of packets, and `report` keeps what came of it.
"""
