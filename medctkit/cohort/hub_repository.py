"""A repository on the Hugging Face Hub: how it is asked, and what its refusals mean for the person who asked.

Every error is a built-in exception: PermissionError (token, terms), FileNotFoundError, ConnectionError, OSError.
None of them, no `repr` and no log line shows the token or the signature of an address.
"""

import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ATTEMPTS = 5  # at one question or file
WAIT = 1.0  # seconds after the first failure; doubled after each further one

Answer = TypeVar("Answer")


def token_source() -> str | None:
    """Where this machine has a Hugging Face token: HF_TOKEN, a file, or None. The hub isn't asked."""
    from huggingface_hub import constants

    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "HF_TOKEN"
    return constants.HF_TOKEN_PATH if Path(constants.HF_TOKEN_PATH).is_file() else None


@dataclass(frozen=True)
class HubRepository:
    """A repository on a hub.

    Args:
        repo_id: owner and name.
        repo_type: "dataset" or "model".
    """

    repo_id: str
    repo_type: str = "dataset"

    @property
    def endpoint(self) -> str:
        """Address of the hub: HF_ENDPOINT, or huggingface.co."""
        from huggingface_hub import constants

        return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

    @property
    def page(self) -> str:
        """Its page in a browser."""
        return f"{self.endpoint}/{'datasets/' if self.repo_type == 'dataset' else ''}{self.repo_id}"

    def ask(self, question: Callable[["HfApi"], Answer], about: str) -> Answer:
        """Call `question` with the hub's API, again where that can help; its errors are explained."""
        from huggingface_hub import HfApi

        for attempt in range(ATTEMPTS):
            try:
                return question(HfApi(endpoint=self.endpoint))
            except Exception as error:
                cause = error.__cause__ if type(error).__name__ == "LocalEntryNotFoundError" else None
                error = cause if isinstance(cause, Exception) else error
                if attempt + 1 == ATTEMPTS or not _may_pass(error):
                    raise self._explained(error, about) from None
                time.sleep(WAIT * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _explained(self, error: Exception, about: str) -> Exception:
        """The built-in exception that says what went wrong at `about` and what to do; others as they are."""
        from huggingface_hub import errors, get_token

        status, tokens = _status_of(error), f"{self.endpoint}/settings/tokens"
        code = error.response.headers.get("X-Error-Code") if isinstance(error, errors.HfHubHTTPError) else None
        said = _without_secrets(getattr(error, "server_message", None) or "")
        if isinstance(error, errors.OfflineModeIsEnabled):
            return ConnectionError("HF_HUB_OFFLINE is set, so nothing can be fetched; unset it and run this again")
        if isinstance(error, errors.LocalTokenNotFoundError) or (status == 401 and get_token() is None):
            return PermissionError(
                f"{self.page}: there is no Hugging Face token on this machine, and without one the hub doesn't show "
                f"this repository. Log in at {self.endpoint}, accept the terms on the repository's page, make a "
                f"token (type Read) at {tokens}, and run `hf auth login`, or set HF_TOKEN"
            )
        if isinstance(error, UnicodeEncodeError) or type(error).__name__ in ("LocalProtocolError", "InvalidHeader"):
            return PermissionError("the Hugging Face token has blanks or letters in it that no token has; copy it anew")
        if status == 401:
            return PermissionError(
                f"{self.page}: the hub refuses the token: expired, revoked or mistyped. Make a new one at {tokens}, "
                "and run `hf auth login`; HF_TOKEN, where it is set, goes before that login"
            )
        if status == 403 and "fine-grained" in said:
            return PermissionError(
                f"{self.page}: the token may not read gated repositories. Tick 'Read access to contents of all "
                f"public gated repos you can access' for it at {tokens}, or make one of type Read"
            )
        if code == "GatedRepo":
            return PermissionError(
                f"{self.page}: the account of this token has not accepted the terms, or waits for approval. Open "
                "the page with that account, accept, and run this again"
            )
        if code == "RepoNotFound":
            return FileNotFoundError(
                f"{self.page}: there is no such {self.repo_type} repository, or it is private; check its name"
            )
        if status == 404:
            return FileNotFoundError(f"{about}: there is no such file in {self.page}")
        if status is not None:
            advice = "check the token's rights" if status == 403 else "try again later"
            return OSError(f"{about}: {self.endpoint} answers {status}{f' ({said})' if said else ''}; {advice}")
        if isinstance(error, _transport_errors()):
            reason = re.search(r"\[Errno -?\d+\] [\w ]+|CERTIFICATE_VERIFY_FAILED", str(error))
            return ConnectionError(
                f"{about}: no connection to {self.endpoint} ({reason[0] if reason else type(error).__name__}). Check "
                "the network and, behind a proxy, HTTPS_PROXY; compute nodes of a cluster often have no network, its "
                "login node has. What has arrived whole stays"
            )
        strange = (errors.FileMetadataError, ValueError, KeyError)
        if isinstance(error, strange) and not isinstance(error, errors.HFValidationError):
            return OSError(
                f"{about}: what answers at {self.endpoint} is not a hub; check HF_ENDPOINT, and whether a proxy or a "
                "login page lies between"
            )
        if isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno is None):
            return OSError(f"{about}: {_without_secrets(str(error))}; try again later")
        return error


def _without_secrets(text: str) -> str:
    from huggingface_hub import get_token

    text = text.replace(get_token() or "\0", "***")
    return re.sub(r"hf_\w+|\?\S+", "***", " ".join(text.split()))[:200]  # queries hold signatures


def _without_queries(record: logging.LogRecord) -> bool:
    """Filter of log lines: the hub's library writes whole addresses where a connection drops, signature and all."""
    record.msg, record.args = re.sub(r"\?\S+", "?***", record.getMessage()), None
    return True


for _name in ("huggingface_hub.file_download", "huggingface_hub.utils._http", "httpx", "httpx2"):
    logging.getLogger(_name).addFilter(_without_queries)


def _may_pass(error: Exception) -> bool:
    """Whether asking again can help: a busy server, a connection that broke, bytes that arrived wrong."""
    status = _status_of(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    if isinstance(error, _transport_errors()):  # the library has tried long enough where nobody answers
        return type(error).__name__ not in ("ConnectError", "LocalProtocolError", "OfflineModeIsEnabled")
    return type(error) is OSError and error.errno is None


def _status_of(error: Exception) -> int | None:
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _transport_errors() -> tuple[type[Exception], ...]:
    """What a broken connection raises: huggingface_hub 0.x uses requests, 1.x httpx, 2.x httpx2."""
    names = {"requests": "RequestException", "httpx": "TransportError", "httpx2": "TransportError"}
    loaded = [getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules]
    return (ConnectionError, TimeoutError, *loaded)
