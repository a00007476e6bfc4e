"""GPT-2's published weights by name: from Hugging Face's hub or from OpenAI, fetched once and then found in a cache."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from llmfast.data.catalog import ENTRIES, HUB_MODELS, OPENAI_SIZES
from llmfast.data.download import fetch
from llmfast.errors import UserError
from llmfast.files import hash_file

NAMES = (*HUB_MODELS, *(f"openai-community/{name}" for name in HUB_MODELS))


def named_weights(name: str, *, progress: bool = True) -> Path | None:
    """The folder with the weights that ``name`` ("gpt2", ..., "openai-community/gpt2-xl") means, None for other names.

    Through huggingface_hub, where it is installed, and its cache: always the same commit, weights of the right
    SHA-256. Else OpenAI's own checkpoint, in the folder that LLMFAST_CACHE names (else the user's cache folder).
    Raises ``UserError`` where it is in neither cache and cannot be fetched.
    """
    if name not in NAMES:
        return None
    model = name.removeprefix("openai-community/")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        folder = cache_folder() / f"gpt2-{OPENAI_SIZES[model]}"
        for file in ENTRIES[folder.name].files:
            fetch(file, folder, progress=progress, check=False)
        return folder
    return _from_hub(model)


def cache_folder() -> Path:
    """Where llmfast keeps what it fetched: LLMFAST_CACHE, else llmfast in XDG_CACHE_HOME, else in ~/.cache."""
    named = os.environ.get("LLMFAST_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmfast"


def _from_hub(model: str) -> Path:
    from huggingface_hub import hf_hub_download

    commit, _, (sha256, _) = HUB_MODELS[model]
    repository, endpoint = f"openai-community/{model}", os.environ.get("HF_ENDPOINT") or None
    try:
        for file in ENTRIES[model].files:
            _need_answer(repository, file.name, commit, endpoint)
            found = hf_hub_download(repository, file.name, revision=commit, endpoint=endpoint)
            if file.name == "model.safetensors":
                # Its blob is named after the hub's own hash, which the commit fixes.
                blob = Path(found).resolve()
                _check(blob, sha256 or (blob.name if len(blob.name) == 64 else None))
    except UserError:
        raise
    except Exception as error:  # its own, the HTTP library's, and the system's
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{model} is in no cache on this machine and cannot be fetched: {reason[:200]}; where there is a network, "
            f"llmfast download {model} makes a folder to take along"
        ) from None
    return Path(found).parent


def _need_answer(repository: str, name: str, commit: str, endpoint: str | None) -> None:
    """An error at once where a file is not in the cache and nobody answers, for which hf_hub_download takes 20 s."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if try_to_load_from_cache(repository, name, revision=commit) is None:
        with contextlib.suppress(HfHubHTTPError):  # it answers: hf_hub_download says what, or tries again
            get_hf_file_metadata(hf_hub_url(repository, name, revision=commit, endpoint=endpoint), endpoint=endpoint)


def _check(blob: Path, sha256: str | None) -> None:
    """``UserError`` where ``blob`` has another SHA-256; read through once, for huggingface_hub does not."""
    if sha256 is None:
        return
    state = blob.stat()
    seen = cache_folder() / "checked" / sha256
    mark = f"{blob}\n{state.st_size} {state.st_mtime_ns}\n"
    if seen.exists() and seen.read_text(encoding="utf-8", errors="replace") == mark:
        return
    if (found := hash_file(blob).hexdigest()) != sha256:
        raise UserError(f"{blob} has the SHA-256 {found} instead of {sha256}: remove it, and it is fetched again")
    seen.parent.mkdir(parents=True, exist_ok=True)
    seen.write_text(mark, encoding="utf-8")
