"""TRL's two trainers, corrected: what a training run computes, watches, writes and refuses.

Every override of TRL's internals is in trainers.py and masters.py, numbered, with the test that fails when TRL changes. The
loss of a batch must stay what TRL's own path gives: whoever touches that shows both.
"""
