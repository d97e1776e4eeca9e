"""The hub, through its own library (extra `hub`): it knows addresses, tokens, pages and offline mode.

The library's download cache is left alone: files are resumed, checked and named here, by `download`. HF_ENDPOINT names
a mirror that speaks the hub's protocol, HF_TOKEN an access token, HF_HUB_OFFLINE forbids the network.
"""

import email.utils
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from fairway.base.errors import DataError, RecipeError
from fairway.data.fetching.layout import Layout
from fairway.data.fetching.places import Passing, Published

_PASSING = (408, 429, 500, 502, 503, 504)  # statuses after which a second try may help
_PROXY = "name a mirror with HF_ENDPOINT, or a local copy with --from"


class Hub:
    """A repository of the hub at one commit, looked up when the files are listed. endpoint: an address in place of
    HF_ENDPOINT's and the hub's own."""

    def __init__(self, layout: Layout, endpoint: str = "") -> None:
        try:
            import huggingface_hub
            import huggingface_hub.constants  # its attribute only once something has imported it
        except ModuleNotFoundError:
            raise RecipeError("data fetch: needs the package huggingface_hub: pip install 'fairway[hub]'") from None
        self._library: Any = huggingface_hub
        self.layout, self.commit = layout, ""
        self.endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or huggingface_hub.constants.ENDPOINT).rstrip("/")
        self._api: Any = huggingface_hub.HfApi(endpoint=self.endpoint, library_name="fairway")

    def describe(self) -> dict[str, str]:
        layout = self.layout
        return {
            "repository": layout.repository,
            "kind": layout.kind,
            "revision": layout.revision,
            "commit": self.commit,
        }

    def listing(self) -> list[Published]:
        """The files at the commit that the revision stands for now: a branch that moves meanwhile mixes nothing."""
        where: dict[str, Any] = {"repo_id": self.layout.repository, "repo_type": self.layout.kind}
        seconds = self._library.constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            if not self.commit:
                info = self._api.repo_info(**where, revision=self.layout.revision, timeout=seconds)
                self.commit = info.sha or self.layout.revision
            tree = list(self._api.list_repo_tree(**where, revision=self.commit, recursive=True))
        except Exception as error:
            raise self._said(error, self.layout.repository) from error
        return [
            Published(one.path, one.size, one.lfs.sha256 if one.lfs else None, None if one.lfs else one.blob_id)
            for one in tree
            if hasattr(one, "size")  # a folder has none
        ]

    def read(self, file: Published, start: int) -> Iterator[bytes]:
        """The content from `start` on; an empty part first where the server begins anew although asked for the rest."""
        layout, utils = self.layout, self._library.utils
        url = self._library.hf_hub_url(
            layout.repository, file.path, repo_type=layout.kind, revision=self.commit, endpoint=self.endpoint
        )
        headers = utils.build_hf_headers(library_name="fairway") | {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            session, seconds = utils.get_session(), self._library.constants.HF_HUB_DOWNLOAD_TIMEOUT
            with session.stream("GET", url, headers=headers, follow_redirects=True, timeout=seconds) as response:
                if response.status_code not in (200, 206):
                    raise _status(file.path, response.status_code, response.headers)
                _check_size(file, start if response.status_code == 206 else 0, response.headers)
                if start and response.status_code == 200:
                    yield b""
                yield from response.iter_raw()  # as it comes: what came before a drop is kept
        except (Passing, DataError):
            raise
        except Exception as error:
            raise self._said(error, file.path) from error

    def _said(self, error: Exception, what: str) -> Exception:
        """The error of the house for one of the library: of the network, of the server, of offline mode."""
        errors = self._library.errors
        if isinstance(error, errors.OfflineModeIsEnabled):
            return RecipeError("HF_HUB_OFFLINE: is set, and fetching needs the network; unset it, or use --from FOLDER")
        if isinstance(error, errors.HFValidationError):
            return RecipeError(f"{what}: {str(error).splitlines()[0].rstrip('.')}; name a repository as owner/name")
        response = getattr(error, "response", None)
        if isinstance(error, errors.HfHubHTTPError) and response is not None:
            return _status(what, response.status_code, response.headers)
        # httpx in version 1 of the library, httpx2 in version 2: the names of their classes are the same.
        if any(kind.__name__ == "TransportError" for kind in type(error).__mro__):
            return Passing(f"{type(error).__name__} at {self.endpoint}" + (f" ({error})" if str(error) else ""))
        return DataError(
            f"{what}: {self.endpoint} answers as no hub does ({type(error).__name__}: {_line(error)}); {_PROXY}"
        )


def _status(what: str, code: int, headers: Mapping[str, str]) -> Exception:
    """The error for a status that is no success."""
    if code in _PASSING:
        return Passing(f"{what}: status {code}", _asked_wait(headers))
    if code == 404:
        return DataError(f"{what}: not found (404); look at the repository, its kind, its revision and the file's name")
    if code in (401, 403):
        return DataError(
            f"{what}: access refused ({code}): it is private, or not there; set HF_TOKEN to an access token, "
            "or look at the repository's name"
        )
    return DataError(f"{what}: status {code}; {_PROXY}")


def _check_size(file: Published, start: int, headers: Mapping[str, str]) -> None:
    """DataError where the server is about to send another number of bytes than it listed."""
    said = headers.get("Content-Length", "")
    if said.isdecimal() and int(said) + start != file.bytes:
        raise DataError(
            f"{file.path}: the server sends {int(said) + start:,} bytes, its listing says {file.bytes:,}; "
            "fetch again later, or from another mirror"
        )


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After asks for, given as a number or as a date."""
    said = headers.get("Retry-After", "").strip()
    if said.isdecimal():
        return float(said)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time()) if said else None
    except ValueError:
        return None


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:120]
