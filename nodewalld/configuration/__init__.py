"""From TOML files to a valid `Config`, or to every `Problem` in them at once.

`load` finds and merges the files, `locate` knows their lines, `tree` ties both to the values, `schema` and
`entries` say which keys there are, and `values`, `peers`, `positions` and `rules` what may be in them.
"""
