"""Whether this machine, these packages and these settings fit a run: looked at before one begins, and for a report of a fault.

A check looks and changes nothing. What it finds is a `Finding`: ok, a warning, or broken with the remedy.
"""
