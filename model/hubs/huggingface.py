"""Hugging Face's hub, or a mirror of it (HF_ENDPOINT), through huggingface_hub, which comes with transformers."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from model.errors import InputError
from model.hubs import answers
from model.hubs.answers import reason_of, status_of, within

SILENCE_SECONDS = 120.0  # of a server during an upload: it may take its time to check a large file
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


class HuggingFace:
    """The hub as the user who is logged in sees it.

    Raises:
        InputError: huggingface_hub is not installed, or HF_HUB_OFFLINE is set.
    """

    prefix = "hf"

    def __init__(self) -> None:
        try:
            from huggingface_hub import HfApi, constants, get_token
            from huggingface_hub.utils import disable_progress_bars, logging
        except ImportError:
            raise InputError("--to: hf: needs huggingface_hub: pip install huggingface_hub") from None
        if constants.HF_HUB_OFFLINE:
            raise InputError("--to: HF_HUB_OFFLINE is set, so nothing can be sent; unset it")
        limit_silence()
        logging.set_verbosity_error()  # it logs each attempt, with its URL
        if not sys.stderr.isatty():
            disable_progress_bars()
        self._api, self._token = HfApi(), get_token
        self.endpoint = self._api.endpoint

    def check_account(self, repository: str) -> None:
        """Check that the user may write to a repository's owner.

        Raises:
            InputError: there is no valid token, it may only read, the owner is somebody else, or nobody answers.
        """
        if self._token() is None:
            raise InputError(f"hf:{repository}: no token found; {LOG_IN} (with a token that may write)")
        with self._one_line(repository):
            found = within(answers.ANSWER_SECONDS, self._api.whoami)
        owners = [found["name"], *(organization["name"] for organization in found.get("orgs") or ())]
        owner = repository.partition("/")[0]
        if owner.lower() not in [name.lower() for name in owners]:
            raise InputError(
                f"hf:{repository}: {owner} is somebody else, the token belongs to {', '.join(owners)}; give"
                f" hf:{owners[0]}/NAME, or {LOG_IN}"
            )
        if ((found.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise InputError(f"hf:{repository}: the token may only read; {LOG_IN} with one that may write")

    def visibility(self, repository: str) -> str | None:
        """ "private" or "public"; None: there is no such repository, or none that the user may see.

        Raises:
            InputError: the hub gives no usable answer.
        """
        try:
            with self._one_line(repository):
                found = within(answers.ANSWER_SECONDS, lambda: self._api.model_info(repository))
        except InputError as error:
            if status_of(error) == 404:
                return None
            raise
        return "private" if found.private else "public"

    def create(self, repository: str, is_private: bool, license: str) -> None:
        """Make a repository; its licence is told by the card.

        Raises:
            InputError: the name is taken, or the hub refuses.
        """
        with self._one_line(repository):
            within(answers.ANSWER_SECONDS, lambda: self._api.create_repo(repository, private=is_private))

    def send(self, repository: str, folder: Path) -> str:
        """Send a folder's files as one commit: all of them appear, or none. Returns the address of their page.

        Raises:
            InputError: the connection breaks, or the hub refuses.
        """
        from huggingface_hub import CommitOperationAdd

        added = [CommitOperationAdd(path.name, str(path)) for path in sorted(folder.iterdir())]
        with self._one_line(repository, is_sending=True):
            self._api.create_commit(repository, added, commit_message="Publish the model with MateConv")
        return f"{self.endpoint}/{repository}"

    @contextlib.contextmanager
    def _one_line(self, repository: str, is_sending: bool = False) -> Iterator[None]:
        """Turn what the library raises into an InputError.

        Args:
            is_sending: files may have arrived in part.
        """
        try:
            yield
        except Exception as error:  # errors of the library and of its HTTP library, OSError, ValueError, RuntimeError
            status, reason = status_of(error), reason_of(error)
            meanings = {
                401: f"{self.endpoint} refuses the token (401); {LOG_IN}",
                403: f"{self.endpoint} forbids it (403); {LOG_IN} with a token that may write there",
                404: f"{self.endpoint} has no such repository (404)",
                409: "the name is taken, by a repository that your token cannot see (409); give another name",
                None: f"{self.endpoint} cannot be reached ({reason}); check the network, or HF_ENDPOINT",
            }
            if is_sending:
                meanings |= {
                    409: "somebody else changed the repository meanwhile (409)",
                    None: f"the connection to {self.endpoint} broke ({reason})",
                }
            text = meanings.get(status, f"{self.endpoint} answers with an error ({reason})")
            if is_sending:
                text = f"sending failed: {text}; the files appear all at once or not at all: run the command again"
                if status in (None, 404, 501):
                    text += ", with HF_HUB_DISABLE_XET=1 if the server lacks Xet"
            raise InputError(f"hf:{repository}: {text}") from error


def limit_silence() -> None:
    """Let requests end that a server never answers: huggingface_hub has waited for ever since its version 1."""
    with contextlib.suppress(ImportError):  # before, it had time limits
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils._http import default_client_factory

        def client():
            made = default_client_factory()
            made.timeout = SILENCE_SECONDS
            return made

        set_client_factory(client)


def ways_out() -> str:
    """What to do where the hub cannot be reached for a dataset."""
    from huggingface_hub import constants

    first = "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "set HF_ENDPOINT to a mirror"
    return f"{first}, read it from ModelScope (ms:OWNER/NAME), or download it and give the files"


def check_dataset(name: str) -> None:
    """Check that the hub answers and gives a dataset's files, before `datasets` retries for minutes. Nothing is asked
    offline.

    Raises:
        InputError: it has no such dataset, the user may not read it, or nobody answers.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return
    limit_silence()
    api = HfApi()
    try:
        within(answers.ANSWER_SECONDS, lambda: _ask_for_a_byte(api, name))
    except Exception as error:  # as above
        forbidden = f"accept its terms at {api.endpoint}/datasets/{name}, and {LOG_IN} (403)"
        text = answers.why_no_dataset(error, api.endpoint, name, forbidden, LOG_IN, ways_out())
        raise InputError(text) from error


def _ask_for_a_byte(api, name: str) -> None:
    """Read the first byte of a dataset's last file: it may come from another host than the answers do."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    files = [file.rfilename for file in api.dataset_info(name).siblings or ()]
    session = get_session()
    if not files or not callable(getattr(session, "stream", None)):  # before version 1 it is one of requests
        return
    headers = build_hf_headers() | {"Range": "bytes=0-0"}
    with session.stream("GET", hf_hub_url(name, files[-1], repo_type="dataset"), headers=headers) as response:
        hf_raise_for_status(response)
        next(response.iter_bytes(1), None)
