"""The nouns of the pipeline; the scripts at the repository root are its verbs."""

__version__ = "0.1.0"
