"""Finished runs answer a question: `python -m posttrain.chat RUN ... QUESTION`.

Prompt, decoding and verdict are those of evaluation: what evaluate.py calls is called here, too, and never written again.
"""
