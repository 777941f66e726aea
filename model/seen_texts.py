"""Which texts were seen already, on disk: finding exact duplicates in any amount of text with bounded memory."""

import hashlib
import sqlite3
from pathlib import Path

from model.errors import InputError

CACHE_KIB = 64 << 10


class SeenTexts:
    """An SQLite table of the texts' 128-bit BLAKE2b hashes, each with the number of the line that came first.

    Memory: SQLite's page cache, at most 64 MiB however many texts there are; the file takes about 40 bytes a text. Two
    different texts are taken for one with a probability below n² / 2^129: 10^-21 for a billion.

    The open table is locked, so a second process that works on the same output is refused.

    Raises:
        InputError: another process holds the table, or its file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            for command in (
                "PRAGMA locking_mode=EXCLUSIVE",
                "PRAGMA journal_mode=WAL",
                "PRAGMA synchronous=FULL",
                f"PRAGMA cache_size=-{CACHE_KIB}",
                "CREATE TABLE IF NOT EXISTS seen (hash BLOB PRIMARY KEY, line INTEGER) WITHOUT ROWID",
                "BEGIN IMMEDIATE",
            ):
                self._connection.execute(command)
        except sqlite3.OperationalError as error:
            self._connection.close()
            if "locked" in str(error):
                raise InputError(f"{path} is in use: another process is making the same file; wait for it") from error
            raise InputError(f"{path} cannot be written ({error})") from error
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise InputError(f"{path} is damaged ({error}); delete it and start over with resume=False") from error

    def forget_after(self, line: int) -> None:
        """Forget the lines past `line`; 0 forgets everything."""
        if line == 0:
            self._connection.execute("DELETE FROM seen")  # without WHERE: the pages are dropped, not the rows
        else:
            self._connection.execute("DELETE FROM seen WHERE line > ?", (line,))

    def first_line(self, text: str, line: int) -> int | None:
        """The number of the line that had this text; None, and remembered, where it is new."""
        key = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if self._connection.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, line)).rowcount:
            return None
        return self._connection.execute("SELECT line FROM seen WHERE hash = ?", (key,)).fetchone()[0]

    def commit(self) -> None:
        """Make what was remembered so far durable."""
        self._connection.execute("COMMIT")
        self._connection.execute("BEGIN IMMEDIATE")

    def close(self, delete: bool = False) -> None:
        """Close the table; what was not committed is forgotten. With `delete`, remove its files. Twice is once."""
        self._connection.close()
        if delete:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
