"""Access to the Hugging Face Hub: cached snapshots, and checks that a model can be downloaded."""

from __future__ import annotations

from pathlib import Path

from mint_ray.config.loader import UserError, one_line

TIMEOUT_S = 5.0
"""Timeout of a request to the Hub, in seconds."""


def cached_snapshot(model_id: str, revision: str | None) -> Path | None:
    """Return the folder of the model in the local cache of the Hub, without network access; None if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model_id, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def list_files(model_id: str, revision: str | None, reason: str) -> set[str]:
    """Return the names of the model's files on the Hub, and download its `config.json` to the cache.

    Args:
        model_id: Id of the model on the Hub.
        revision: Branch, tag or commit; None for `main`.
        reason: Reason why the Hub is needed, for errors: what is wrong with the local cache.

    Raises:
        UserError: The model does not exist, may not be read, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    prefix = f"model_id: {model_id}"
    try:
        info = HfApi().model_info(model_id, revision=revision, timeout=TIMEOUT_S)
        # anyone can list the files of a gated model, but not download one; this also caches which commit is current
        hf_hub_download(model_id, "config.json", revision=revision, etag_timeout=TIMEOUT_S)
    except HFValidationError as error:
        raise UserError(f"{prefix}: neither a folder nor a Hub id") from error
    except GatedRepoError as error:
        raise UserError(f"{prefix}: gated; accept its terms on the Hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{prefix}: no such folder, and no such model on the Hub (a private one needs HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{prefix}: has no revision {revision!r}") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{prefix}: {reason}, and HF_HUB_OFFLINE is set") from error
    # every other failure (name service, proxy, certificate, timeout) gets the same message
    except Exception as error:
        raise UserError(f"{prefix}: {reason}, and the Hub cannot be reached: {one_line(error)}") from error
    return {sibling.rfilename for sibling in info.siblings or []}


def download_config(model_id: str, revision: str | None) -> Path:
    """Return the path of the model's `config.json` in the local cache, downloading it if necessary."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(model_id, "config.json", revision=revision))
