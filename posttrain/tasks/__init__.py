"""What a question is, where it comes from, how its worked solution is written, and which training data give its answer away.

Files and data sets of any schema are read by settings alone (files.py, hub.py, fields.py). A source with code of its own has a
short contract: it yields rows in GSM8K's form, a question and a worked solution that ends in a line `#### <number>`. Checks,
splits, prompt, reward, evaluation, report and card follow. It is a file here, a `kind` in schema/data.py, a line in sources.py.
"""
