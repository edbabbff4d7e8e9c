"""What a text says that the answer is: numbers, and where they are stated. rewards.py has the verdicts. Standard library alone.

Only the modules of this room may change what is read, and each change of a verdict raises `rewards.GRADER_VERSION`.

Any text gets a verdict in linear time: every repetition in a pattern is possessive (`*+`) or bounded. For groups the possessive
form is spelled as an atomic group, `(?>(?:...)*)`, which means the same: Python before 3.11.5 matches a possessive group wrongly
(github.com/python/cpython/issues/106052 and 100061).
"""
