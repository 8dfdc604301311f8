"""A repository on the Hugging Face Hub: asking it, and what its refusals mean for the person who asked.

Every error is a built-in exception: PermissionError (token, terms), FileNotFoundError, ConnectionError, OSError.
None of them, and no `repr`, shows the token.
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT = 30  # seconds without a byte
ATTEMPTS = 6  # failures in a row
WAIT = 1.0  # seconds after the first failure; doubled after each further one


def token_source() -> str | None:
    """Where this machine has a Hugging Face token: HF_TOKEN, a file, or None. The hub isn't asked."""
    from huggingface_hub import constants

    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "HF_TOKEN"
    return constants.HF_TOKEN_PATH if Path(constants.HF_TOKEN_PATH).is_file() else None


@dataclass(frozen=True)
class Repository:
    """A repository on a hub.

    Args:
        repo_id: owner and name.
        repo_type: "dataset" or "model".
        endpoint: address of the hub; by default HF_ENDPOINT, or huggingface.co.
        token: a token; None: the one of this machine; False: none.
    """

    repo_id: str
    repo_type: str = "dataset"
    endpoint: str | None = None
    token: str | bool | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        from huggingface_hub import constants

        endpoint = self.endpoint or os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        object.__setattr__(self, "endpoint", endpoint.rstrip("/"))

    @property
    def page(self) -> str:
        """Its page in a browser."""
        return f"{self.endpoint}/{'datasets/' if self.repo_type == 'dataset' else ''}{self.repo_id}"

    def ask(self, question: Callable, about: str):
        """Call `question` with the hub's `HfApi`; a busy hub is asked again, other errors are explained."""
        from huggingface_hub import HfApi

        wait = threading.Event().wait
        for attempt in count(1):
            try:
                return question(HfApi(endpoint=self.endpoint, token=self.token))
            except Exception as error:
                if status_of(error) is None or not self.may_pass(error) or attempt == ATTEMPTS:
                    raise self.explain(error, about) from None
                wait(pause(attempt, error))

    def url(self, name: str, revision: str) -> str:
        """Address of a file's bytes."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo_id, name, repo_type=self.repo_type, revision=revision, endpoint=self.endpoint)

    @contextmanager
    def stream(self, name: str, revision: str, start: int) -> Iterator[tuple[int, int | None, Iterator[bytes]]]:
        """Open a file from byte `start` on: the first byte that comes, the length of the whole file, chunks.

        A server that can't begin in the middle sends the whole file from byte 0.
        """
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        session, url = get_session(), self.url(name, revision)
        headers = build_hf_headers(token=self.token) | {"accept-encoding": "identity"}
        headers |= {"range": f"bytes={start}-"} if start else {}
        is_httpx = callable(session.stream)  # a flag of requests has the same name
        if is_httpx:
            request = session.stream("GET", url, headers=headers, timeout=TIMEOUT)
        else:
            request = session.get(url, headers=headers, timeout=TIMEOUT, stream=True)
        with request as response:
            hf_raise_for_status(response)
            part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            length = part[2] if part else response.headers.get("Content-Length")
            if response.headers.get("Content-Encoding", "identity") != "identity":
                length = None
            chunks = response.iter_bytes() if is_httpx else response.iter_content(2**13)
            yield int(part[1]) if part else 0, int(length) if length else None, chunks

    def may_pass(self, error: Exception) -> bool:
        """Whether asking again can help: a broken connection, a busy server, a storage address out of date."""
        status = status_of(error)
        if status is None:
            return isinstance(error, transport_errors()) and type(error).__name__ != "OfflineModeIsEnabled"
        elsewhere = urlsplit(str(error.response.url)).netloc != urlsplit(self.endpoint).netloc
        return status in (408, 429) or status >= 500 or (status == 403 and elsewhere)

    def explain(self, error: Exception, about: str) -> Exception:
        """The built-in exception that says what went wrong at `about` and what to do; others as they are."""
        from huggingface_hub import errors, get_token

        status, tokens = status_of(error), f"{self.endpoint}/settings/tokens"
        code = error.response.headers.get("X-Error-Code") if status else None
        said = self._without_token(getattr(error, "server_message", None) or "")
        has_token = isinstance(self.token, str) or (self.token is None and get_token() is not None)
        if isinstance(error, errors.OfflineModeIsEnabled):
            return ConnectionError("HF_HUB_OFFLINE is set, so nothing can be fetched; unset it and run this again")
        if isinstance(error, errors.LocalTokenNotFoundError) or (status == 401 and not has_token):
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
        if isinstance(error, transport_errors()):
            reason = re.search(r"\[Errno -?\d+\] [\w ]+|CERTIFICATE_VERIFY_FAILED", str(error))
            return ConnectionError(
                f"{about}: no connection to {self.endpoint} ({reason[0] if reason else type(error).__name__}). Check "
                "the network and, behind a proxy, HTTPS_PROXY; compute nodes of a cluster often have no network, its "
                "login node has"
            )
        strange = (errors.FileMetadataError, ValueError, KeyError)
        if isinstance(error, strange) and not isinstance(error, errors.HFValidationError):
            return OSError(
                f"{about}: what answers at {self.endpoint} is not a hub; check HF_ENDPOINT, and whether a proxy or a "
                "login page lies between"
            )
        return error

    def _without_token(self, text: str) -> str:
        from huggingface_hub import get_token

        token = self.token if isinstance(self.token, str) else get_token()
        text = text.replace(token, "***") if token else text
        return re.sub(r"hf_\w+|\?\S+", "***", " ".join(text.split()))[:200]  # queries hold signatures


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error of huggingface_hub stands for, if any."""
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def transport_errors() -> tuple[type[Exception], ...]:
    """What a broken connection raises: huggingface_hub 0.x uses requests, 1.x httpx, 2.x httpx2."""
    names = {"requests": "RequestException", "httpx": "TransportError", "httpx2": "TransportError"}
    loaded = [getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules]
    return (ConnectionError, TimeoutError, *loaded)


def pause(attempt: int, error: Exception | None = None) -> float:
    """Seconds to wait after the first, second ... failure, or as long as the server says."""
    said = error.response.headers.get("Retry-After", "") if error is not None and status_of(error) else ""
    return min(int(said), 300) if said.isdigit() else WAIT * 2 ** (attempt - 1)
