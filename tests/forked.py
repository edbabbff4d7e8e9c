"""The last that the fork server imports: what forked processes would each do again is done once, before the first of them.

A full collection of garbage looks at every object, and so copies every page that a forked process shares with the server:
gc.freeze() is made for that (docs.python.org/3/library/gc.html#gc.freeze).
"""

import gc

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("llama")  # compiles 900 patterns, for whichever model is asked for first
gc.collect()
gc.freeze()
