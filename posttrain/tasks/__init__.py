"""What a question is, where it comes from, what its worked solution looks like, and which training would give it away.

The contract of a source is short: it yields rows that speak GSM8K's text, a question and a worked solution that ends in a line
`#### <number>`. Checks, splits, prompt, reward, evaluation, report and card follow from that. A new data set is a file here, a
`kind` in config/schema.py and a line in sources.py.
"""
