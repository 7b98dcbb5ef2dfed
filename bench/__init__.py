"""What nodewalld costs, beside what the tools themselves cost in the same run: `python -m bench`.

`rows` lists what is measured, in modules of their own: `repair`, `exposure`, `cost`, `lean`, `beside`, `endurance`.
`stage` builds throw-away nodes of the package `lab`, `inside` is the process within them that disturbs and observes,
`crowd` writes foreign rules as kube-proxy does. `figures` computes, `report` and `picture` show.

Law: nodewalld is measured from outside, as a real daemon. A figure stands beside its reference of the same run, because
absolute times move with the machine.
"""
