"""TRL's two trainers, corrected: what a training run computes, watches, writes and refuses.

trainers.py and masters.py hold every override of TRL's internals, numbered, with the tests that fail when TRL changes. The loss
of a batch must stay what TRL's own path gives: a change of it shows both.
"""

import posttrain.models  # noqa: F401  # before the first module of this room imports PEFT: it quiets libraries
