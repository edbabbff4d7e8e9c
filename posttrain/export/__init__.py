"""A finished run -> a model that others load: `python -m posttrain.export RUN --format merged|gguf|ollama`.

Every artefact is run in its own runtime and compared with the policy that training measured, before it gets its name: what was
lost stands beside it in fidelity.json. A run is only read, and an artefact never replaces another.
"""
