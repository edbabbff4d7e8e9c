"""A run directory is the unit of truth: it is created first, locked while in use, refused to other settings, never deleted.

Published runs are read back by it, so the names in manifest.json and metrics.jsonl are a promise: add one, never rename one.
"""
