"""Whether token files are what their manifests describe: small ones are read through at once, large ones while training
takes its first steps."""

import threading
from collections.abc import Callable, Sequence

from model.dataset import PretrainDataset, verify_tokens
from model.storage.files import size_text
from model.token_file.chats import verify_companions


class Stopped(Exception):
    """Nobody waits for the verification any more."""


def verify(dataset: PretrainDataset, between_blocks: Callable[[], None] = lambda: None) -> None:
    """Read a token file and what lies beside it whole; its `verified_sha256` is known afterwards.

    Args:
        between_blocks: called after each block of the token file; what it raises ends the reading.

    Raises:
        InputError: the file is damaged, see `verify_tokens` and `verify_companions`.
    """
    dataset.verified_sha256 = verify_tokens(dataset, between_blocks)
    if dataset.chats is not None:
        verify_companions(dataset.path, dataset.manifest)


class BackgroundVerification:
    """Verifies token files in a thread, one after the other, while training goes on.

    Args:
        datasets: the files, if any.
        say: prints one line for the user.
    """

    def __init__(self, datasets: Sequence[PretrainDataset], say: Callable[[str], None]) -> None:
        self._datasets, self._say = datasets, say
        self._error: BaseException | None = None
        self._stopped, self._done = threading.Event(), threading.Event()

    def start(self) -> None:
        """Begin to read, if there is anything to read."""
        self._stopped.clear()
        if not self._datasets:
            self._done.set()
            return
        threading.Thread(target=self._work, name="verification", daemon=True).start()

    def check(self) -> None:
        """Raise what was found so far.

        Raises:
            InputError: a file is damaged.
        """
        if self._error is not None:
            raise self._error

    def wait(self, every_second: Callable[[], None], is_stop_asked: Callable[[], bool]) -> None:
        """Wait until all files are verified, or a stop is asked for.

        Raises:
            InputError: a file is damaged.
        """
        if not self._done.is_set():
            total = size_text(sum(dataset.tokens.nbytes for dataset in self._datasets))
            self._say(f"waiting until the token files are verified, {total} in all, before the first save")
        while not self._done.wait(timeout=1) and not is_stop_asked():
            every_second()
        self.check()

    def close(self) -> None:
        """End the reading."""
        self._stopped.set()

    def _work(self) -> None:
        try:
            for dataset in self._datasets:
                verify(dataset, self._raise_if_stopped)
                self._say(f"{dataset.path}: verified")
        except Stopped:
            pass
        except BaseException as error:  # whatever it is, the main thread raises it
            self._error = error
        finally:
            self._done.set()

    def _raise_if_stopped(self) -> None:
        if self._stopped.is_set():
            raise Stopped
