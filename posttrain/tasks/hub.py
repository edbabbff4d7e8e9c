"""Data sets of the Hub, of any schema, through `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.config.schema import HubSource
from posttrain.errors import UserError
from posttrain.tasks.files import arrow_table, is_saved
from posttrain.tasks.rows import Table

AS_JSONL = "and use `source: {kind: jsonl, path: FOLDER}`"


def hub_tables(source: HubSource, wanted: set[str]) -> list[Table]:
    """A table for each split of a data set."""
    splits = load_hub(source)
    tables = [arrow_table(rows, f"{source.repo_id}/{name}", name, wanted) for name, rows in splits.items()]
    if empty := [table.name for table in tables if not table.rows]:
        raise UserError(f"{empty[0]} holds no row: name the splits to read, `splits: {{train: NAME, test: NAME}}` under source")
    return tables


def load_hub(source: HubSource) -> Mapping[str, Any]:
    """The splits of a data set of the Hub, or of a folder of its files.

    Raises:
        UserError: it cannot be read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    from posttrain.models.network import look_for_hub

    if is_saved(Path(source.repo_id)):
        raise UserError(f"{source.repo_id} is a folder of save_to_disk: use `source: {{kind: files, path: {source.repo_id}}}`")
    if not Path(source.repo_id).exists():
        look_for_hub()
    try:
        splits: Mapping[str, Any] = load_dataset(source.repo_id, source.config_name, revision=source.revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, OSError) as error:
        raise UserError(
            f"{source.repo_id} could not be read from the Hub ({type(error).__name__}): connect to the network, or download "
            f"its JSONL files {AS_JSONL}"
        ) from error
    except (ValueError, DatasetsError) as error:  # an unknown configuration, files of no known kind
        raise UserError(f"{source.repo_id} could not be read: {' '.join(str(error).split())[:300]}") from error
    return splits
