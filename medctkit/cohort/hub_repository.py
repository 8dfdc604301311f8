"""A repository on the Hugging Face Hub: how it is asked, and what its refusals mean for the person who asked.

Every error is a built-in exception: PermissionError (token, terms), FileNotFoundError, ConnectionError, OSError.
None of them, no `repr` and no log line shows the token or the signature of an address.
"""

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, errors, get_token

WAIT = 2.0  # seconds before something is asked for a second time

Answer = TypeVar("Answer")


def token_source() -> str | None:
    """Where this machine has a Hugging Face token: HF_TOKEN, a file, or None. The hub isn't asked."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "HF_TOKEN"
    return constants.HF_TOKEN_PATH if Path(constants.HF_TOKEN_PATH).is_file() else None


@dataclass(frozen=True)
class HubRepository:
    """A repository, "dataset" or "model", on the hub at HF_ENDPOINT or huggingface.co."""

    repo_id: str
    repo_type: str = "dataset"

    @property
    def endpoint(self) -> str:
        """Address of the hub."""
        return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

    @property
    def page(self) -> str:
        """Its page in a browser."""
        return f"{self.endpoint}/{'datasets/' if self.repo_type == 'dataset' else ''}{self.repo_id}"

    def ask(self, question: Callable[[HfApi], Answer], about: str) -> Answer:
        """Call `question` with the hub's API, twice where the fault may pass; its errors are explained."""
        last, lasting = False, (PermissionError, FileNotFoundError)
        while True:
            try:
                return question(HfApi(endpoint=self.endpoint))
            except Exception as error:
                said = self._explained(error, about)
                if last or not isinstance(said, OSError) or said.errno is not None or isinstance(said, lasting):
                    raise said from None
            last = True
            time.sleep(WAIT)

    def _explained(self, error: BaseException, about: str) -> BaseException:
        """The built-in exception that says what went wrong at `about` and what to do; others as they are."""
        if isinstance(error, errors.LocalEntryNotFoundError):  # what it came from says more
            error = error.__cause__ or error
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
        token, tokens = get_token(), f"{self.endpoint}/settings/tokens"
        if isinstance(error, errors.OfflineModeIsEnabled):
            return ConnectionError("HF_HUB_OFFLINE is set, so nothing can be fetched; unset it and run this again")
        if token and not re.fullmatch(r"[!-~]+", token):
            return PermissionError("the Hugging Face token has blanks or letters in it that no token has; copy it anew")
        if status == 401 and not token:
            return PermissionError(
                f"{self.page}: there is no Hugging Face token on this machine, and without one the hub doesn't show "
                f"this repository. Log in at {self.endpoint}, accept the terms on the repository's page, make a "
                f"token (type Read) at {tokens}, and run `hf auth login`, or set HF_TOKEN"
            )
        if status == 401:
            return PermissionError(
                f"{self.page}: the hub refuses the token: expired, revoked or mistyped. Make a new one at {tokens}, "
                "and run `hf auth login`; HF_TOKEN, where it is set, goes before that login"
            )
        if status == 403 and "fine-grained" in str(error):
            return PermissionError(
                f"{self.page}: the token may not read gated repositories. Tick 'Read access to contents of all "
                f"public gated repos you can access' for it at {tokens}, or make one of type Read"
            )
        if isinstance(error, errors.GatedRepoError):
            return PermissionError(
                f"{self.page}: the account of this token has not accepted the terms, or waits for approval. Open "
                "the page with that account, accept, and run this again"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return FileNotFoundError(
                f"{self.page}: there is no such {self.repo_type} repository, or it is private; check its name"
            )
        if status == 404:
            return FileNotFoundError(f"{about}: there is no such file in {self.page}")
        if status is not None:
            advice = "check the token's rights" if status == 403 else "try again later"
            return OSError(f"{about}: {self.endpoint} answers {status}; {advice}")
        if isinstance(error, ValueError) and "Invalid metadata" in str(error):  # of a card that is uploaded
            return ValueError(f"{about}: {error}")
        if isinstance(error, (errors.FileMetadataError, ValueError, KeyError)):
            return OSError(
                f"{about}: what answers at {self.endpoint} is not a hub; check HF_ENDPOINT, and whether a proxy or a "
                "login page lies between"
            )
        # huggingface_hub 0.x uses requests, 1.x httpx, 2.x httpx2
        library = type(error).__module__.partition(".")[0]
        if isinstance(error, (ConnectionError, TimeoutError)) or library in ("requests", "httpx", "httpx2"):
            reason = re.search(r"\[Errno -?\d+\] [\w ]+|CERTIFICATE_VERIFY_FAILED", str(error))
            return ConnectionError(
                f"{about}: no connection to {self.endpoint} ({reason[0] if reason else type(error).__name__}). Check "
                "the network and, behind a proxy, HTTPS_PROXY; compute nodes of a cluster often have no network, its "
                "login node has. What has arrived whole stays"
            )
        if isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno is None):
            return OSError(f"{about}: {_without_secrets(str(error))}; try again later")
        return error


def _without_secrets(text: str) -> str:
    return re.sub(r"hf_\w+|\?\S+", "***", text)  # queries hold signatures


def _clean(record: logging.LogRecord) -> bool:
    """Filter of log lines: the hub's library writes whole addresses where a connection drops."""
    record.msg, record.args = _without_secrets(record.getMessage()), None
    return True


for _name in ("huggingface_hub.file_download", "huggingface_hub.utils._http", "httpx", "httpx2"):
    logging.getLogger(_name).addFilter(_clean)
