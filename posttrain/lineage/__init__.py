"""Where a model comes from, and whether each link of the way holds: `python -m posttrain.lineage RUN|FOLDER`.

Nothing here writes or downloads: a link is judged by the records and files that are on this machine.
"""
