"""The guard at work, for people to watch: `python -m demo [--backend nft|legacy] [--no-colour]`.

`story` tells it scene by scene, `knocking` measures what gets through while neighbours misbehave, `machine` proves
that nothing is left, and `page` prints. Everything happens in a throw-away node of the package `lab`; every number is
measured while it is told, and what is not as the story says ends it with exit status 1.
"""
