"""The nouns of the pipeline; the scripts at the repository root are its verbs."""

import logging

__version__ = "0.1.0"

# On CPUs with AVX512-BF16, importing bitsandbytes warns of a kernel for 4-bit weights that is not installed. posttrain would not
# use it: it has no gradient (models.load_base).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
