"""Settings: one YAML file becomes frozen, typed settings of a stage, or all of its faults with their lines.

A new key goes into `schema`, with its reason beside it; the keys of the `trainer` block are TRL's own and need no line here.
"""
