"""A finished run -> its card -> a repository on the Hub: `python -m posttrain.hub RUN --repo-id OWNER/NAME`.

Only files named in push.py leave this machine, and card.py blots out paths and secrets. Keep it that way.
"""
