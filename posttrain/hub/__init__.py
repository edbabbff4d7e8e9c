"""A finished run -> its card -> a repository on the Hub: `python -m posttrain.hub RUN --repo-id OWNER/NAME`.

Only files named in repository.py leave this machine, and redaction.py blots out paths and secrets. Keep it that way.
"""
