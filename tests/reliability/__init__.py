"""What the promise of reliability stands on: faults that are injected, and what a run makes of them.

    python -m reliability --short        # minutes; the whole takes hours (make reliability)

`rows.py` and `inputs.py` have a function for each row of the first table, `switches.py` the protections that the second table
switches off, one at a time, to show that its row then fails. `place.py` runs the product's commands in forked processes, and
`fault.c` is a library laid under them that ends a process at its k-th call to the file system or fills the disk at a byte.
"""
