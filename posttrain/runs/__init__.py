"""A run directory is the unit of truth: it is created first, locked while in use, refused to other settings, never deleted.

What is read back later (manifest.json, metrics.jsonl) is a promise to published runs: add fields, never rename one.
"""
