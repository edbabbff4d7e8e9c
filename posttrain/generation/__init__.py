"""Prompts -> completions. A step makes one token for every row, the loop repeats it, an engine is the loop or another library.

Greedy tokens are transformers' own, in any batch. Whatever changes here must keep tests/test_generation.py's equivalences.
"""
