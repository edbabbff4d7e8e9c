"""What is trained and what answers: tokenizer and chat format, base, adapter, and the policy made of them.

A new family of models goes here. Its stop token is read off its template, and no number may depend on its name.
"""

from posttrain.console import quiet

quiet()  # before the first module of this room imports PEFT
