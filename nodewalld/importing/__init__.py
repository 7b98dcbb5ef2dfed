"""From rules that people wrote by hand to the TOML that holds them in their places.

`dump` reads iptables-save's text, `owners` knows the neighbours' rules, `inline` resolves hand-made chains, `places`
finds a rule's position among its neighbours, `sets` what `--match-set` names, `account` does it for every line, and
`writing` makes TOML of it.
"""
