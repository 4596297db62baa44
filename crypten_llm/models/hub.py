"""The Hugging Face hub: the only place that asks it for files, and that says what to do when it gives none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from crypten_llm.errors import UsageError, first_line

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
"""What a whole name has to match to be asked for: `owner/name`, or an old `name`."""


def download(
    name: str, offline: bool, patterns: Sequence[str], ignore: Sequence[str] = (), kind: str = "model"
) -> Path:
    """The local folder of those files of a hub repository that match `patterns` and not `ignore`.

    `kind` is "model" or "dataset". With `offline` the hub is not asked and the files come from the local cache.
    Raises UsageError that says why there is nothing and what to do.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            repo_type=kind,
            allow_patterns=list(patterns),
            ignore_patterns=list(ignore),
            local_files_only=offline,
        )
    except errors.GatedRepoError as error:
        raise UsageError(
            f"{name}: access to this {kind} is restricted; accept its licence on its Hugging Face page, then log in "
            "with 'hf auth login'"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UsageError(
            f"{name}: no such folder, and no such {kind} on the Hugging Face hub; check the spelling, and log in with "
            "'hf auth login' if it is private"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if offline:
            raise UsageError(
                f"{name}: no such folder, and not complete in the local Hugging Face cache; run once without --offline "
                f"to download it, or give a {kind} folder"
            ) from error
        raise UsageError(
            f"{name}: no such folder, and the Hugging Face hub cannot be reached to download it; check the network, "
            f"or give a {kind} folder"
        ) from error
    except Exception as error:  # the HTTP library below differs between versions of huggingface_hub
        raise UsageError(
            f"{name}: download from the Hugging Face hub failed ({first_line(error)}); try again or give a folder"
        ) from error
    return Path(folder)
