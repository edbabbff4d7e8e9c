"""Completions become verdicts, and verdicts become numbers with their uncertainty.

Every number is computed again from rows on disk, so nothing here may depend on how, or how often, a run was interrupted.
"""
