"""ModelScope's hub (MODELSCOPE_ENDPOINT), through modelscope, where it is installed."""

import contextlib
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from model.errors import InputError
from model.hubs import answers
from model.hubs.answers import reason_of, status_of, within

INSTALL = "pip install modelscope_hub"  # 2 MB, with the command `modelscope`; the package modelscope needs it
INSTALL_DATASETS = 'pip install "modelscope[datasets]"'
LOG_IN = "log in with `modelscope login --token …`, or set MODELSCOPE_API_TOKEN"
# Of an upload to a server that falls silent: by default the library waits an hour for each of 20 attempts.
PATIENCE = {
    "MODELSCOPE_UPLOAD_BLOB_READ_TIMEOUT_SECONDS": "120",
    "MODELSCOPE_UPLOAD_BLOB_MAX_ATTEMPTS": "3",
    "MODELSCOPE_UPLOAD_COMMIT_MAX_ATTEMPTS": "3",
    "MODELSCOPE_UPLOAD_RECOVERY_ENABLED": "0",
    "MODELSCOPE_UPLOAD_FAILED_FILE_MAX_RETRY_ROUNDS": "1",
}
WAYS_OUT = "check the network, read it from Hugging Face (datasets:OWNER/NAME), or download it and give the files"


class ModelScope:
    """The hub as the user who is logged in sees it.

    Raises:
        InputError: modelscope_hub is not installed.
    """

    prefix = "ms"

    def __init__(self) -> None:
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)  # read when it is imported
        try:
            from modelscope_hub import HubApi
        except ImportError:
            raise InputError(f"--to: ms: needs modelscope_hub: {INSTALL}") from None
        quiet()
        self._api = HubApi()
        self.endpoint = self._api.openapi.base_url.partition("/openapi")[0]

    def check_account(self, repository: str) -> None:
        """Check that there is a valid token. Which organizations its user belongs to, the hub does not say.

        Raises:
            InputError: there is none, or nobody answers.
        """
        with self._one_line(repository):
            within(answers.ANSWER_SECONDS, self._api.whoami)

    def visibility(self, repository: str) -> str | None:
        """ "private" or "public"; None: there is no such repository, or none that the user may see.

        Raises:
            InputError: the hub gives no usable answer.
        """
        from modelscope_hub import Visibility

        try:
            with self._one_line(repository):
                found = within(answers.ANSWER_SECONDS, lambda: self._api.get_repo(repository, "model"))
        except InputError as error:
            if status_of(error) == 404:
                return None
            raise
        return "public" if found.visibility in (Visibility.PUBLIC, "public") else "private"

    def create(self, repository: str, is_private: bool, license: str) -> None:
        """Make a repository. Without a licence the library would say Apache-2.0.

        Raises:
            InputError: the name is taken, or the hub refuses.
        """
        visibility = "private" if is_private else "public"
        license = "Other" if license == "unknown" else license
        with self._one_line(repository):
            within(
                answers.ANSWER_SECONDS,
                lambda: self._api.create_repo(repository, "model", visibility=visibility, license=license),
            )

    def send(self, repository: str, folder: Path) -> str:
        """Send a folder's files; returns the address of their page.

        Raises:
            InputError: the connection breaks, or the hub refuses.
        """
        # It makes the repository where there is none, public and with a license: `create` comes before.
        with self._one_line(repository, is_sending=True), _first_logged_error():
            with contextlib.redirect_stdout(io.StringIO()):  # a report
                self._api.upload_folder(
                    repository,
                    "model",
                    folder,
                    commit_message="Publish the model with MateConv",
                    use_cache=False,
                    disable_tqdm=not sys.stderr.isatty(),
                )
        return f"{self.endpoint}/models/{repository}"

    @contextlib.contextmanager
    def _one_line(self, repository: str, is_sending: bool = False) -> Iterator[None]:
        """Turn what the library raises into an InputError; `is_sending`: files may have arrived in part."""
        try:
            yield
        except Exception as error:  # errors of the library and of requests, OSError, ValueError
            status, reason = status_of(error), _headline(reason_of(error))
            if status is None and type(error).__name__ == "AuthenticationError":
                raise InputError(f"ms:{repository}: no token found; {LOG_IN}") from error
            if type(error).__name__ == "AlreadyExistsError":
                status = 409
            meanings = {
                401: f"{self.endpoint} refuses the token (401); {LOG_IN}",
                403: f"{self.endpoint} forbids it (403); give an owner that is you or your organization",
                404: f"{self.endpoint} has no such repository (404)",
                409: "the name is taken, by a repository that your token cannot see; give another name",
                None: f"{self.endpoint} cannot be reached ({reason}); check the network, or MODELSCOPE_ENDPOINT",
            }
            text = meanings.get(status, f"{self.endpoint} answers with an error ({reason})")
            if is_sending and status is None:
                text = f"the connection to {self.endpoint} broke ({reason})"
            if is_sending:
                text = f"sending failed: {text}; some of the files may be there: run the command again"
            raise InputError(f"ms:{repository}: {text}") from error


def _headline(reason: str) -> str:
    """What the library says, without its own numbers of errors, the request and the answer."""
    return re.sub(r"\[E\d+\] ", "", reason.partition(" Request: ")[0])


@contextlib.contextmanager
def _first_logged_error() -> Iterator[None]:
    """Raise the first exception that the library logs in place of its own, which only counts the files that failed."""
    logged: list[Exception] = []

    def keep(record: logging.LogRecord) -> bool:
        logged.extend(argument for argument in record.args or () if isinstance(argument, Exception))
        return False

    logger = logging.getLogger("modelscope_hub.upload")
    logger.addFilter(keep)
    logger.setLevel(logging.ERROR)
    failure = None
    try:
        yield
    except Exception as error:
        failure = logged[0] if logged else error
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeFilter(keep)
    if failure is not None:
        raise failure


def quiet() -> None:
    """Keep the library's log off the console: what goes wrong is said in our line."""
    for name in ("modelscope", "modelscope_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def dataset_rows(name: str, options: dict) -> Iterator[dict]:
    """The rows of a dataset, streamed through MsDataset, which from then on redirects `datasets` to ModelScope in this
    process.

    Args:
        options: of MsDataset.load; `name` is its `subset_name`, as load_dataset calls it.

    Raises:
        ImportError: modelscope with what its datasets need is not installed.
        InputError: there is no such dataset, the user may not read it, or nobody answers.
    """
    from modelscope.msdatasets import MsDataset
    from modelscope_hub import HubApi

    quiet()
    api = HubApi()
    endpoint = api.openapi.base_url.partition("/openapi")[0]
    try:
        within(answers.ANSWER_SECONDS, lambda: api.get_repo(name, "dataset"))
    except Exception as error:  # as above
        forbidden = f"{endpoint} forbids to read it (403); {LOG_IN}"
        text = answers.why_no_dataset(error, endpoint, name, forbidden, LOG_IN, WAYS_OUT)
        raise InputError(text) from error
    options = {{"name": "subset_name"}.get(key, key): value for key, value in options.items()}
    yield from MsDataset.load(name, use_streaming=True, trust_remote_code=False, **options)
