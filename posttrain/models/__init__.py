"""What is trained and what answers: tokenizer and chat format, base, adapter, and the policy made of them.

A new family of models goes here. Its stop token is read off its template, and no number may depend on its name.
"""

import logging

# PEFT imports bitsandbytes, which warns on CPUs with AVX512-BF16 that a kernel for 4-bit weights is missing. posttrain would
# not use that kernel: it has no gradient (base.py). The level must be set before the first module of this room imports PEFT.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
