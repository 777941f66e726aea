"""Rows of datasets that are streamed: `datasets:NAME?…` from Hugging Face or this disk, `ms:NAME?…` from ModelScope."""

from collections.abc import Generator
from pathlib import Path
from urllib.parse import parse_qs

from model.errors import InputError, first_line
from model.hubs.huggingface import check_dataset, ways_out
from model.hubs.modelscope import INSTALL_DATASETS, dataset_rows

DATASETS = "datasets:"  # datasets:NAME?split=train&name=CONFIG: the options are load_dataset's
MODELSCOPE = "ms:"  # the same, of MsDataset.load
STREAMED = (DATASETS, MODELSCOPE)


class NoRow(InputError):
    """A dataset cannot be read from its first row on."""


def streamed_rows(location: str) -> Generator[dict, None, None]:
    """The rows of a dataset, each as a dict.

    Args:
        location: begins with one of STREAMED.

    Raises:
        NoRow: the library is not installed, the hub does not answer, or the dataset cannot be read.
        InputError: the rest of it cannot be read.
    """
    prefix = MODELSCOPE if location.startswith(MODELSCOPE) else DATASETS
    name, _, query = location.removeprefix(prefix).partition("?")
    options: dict = {"split": "train"}
    for key, values in parse_qs(query.replace("+", "%2B"), keep_blank_values=True).items():  # a + is no space
        options[key] = values[0] if len(values) == 1 else values  # data_files=a&data_files=b are two files
    if not name:
        raise NoRow(f"input_path: {location} names no dataset; expected {prefix}NAME?split=train")
    if prefix == MODELSCOPE and name.count("/") != 1:
        raise NoRow(f"input_path: {location} found, expected ms:OWNER/NAME?split=train")
    rows, install = _of_hugging_face, "datasets: pip install datasets"
    if prefix == MODELSCOPE:
        rows, install = dataset_rows, f"modelscope: {INSTALL_DATASETS}"
    failure = NoRow
    try:
        for row in rows(name, options):
            failure = InputError
            yield row
    except ImportError:
        raise failure(f"input_path: {location} needs {install}") from None
    except InputError as error:
        raise failure(f"input_path: {location} cannot be streamed: {error}") from error
    except Exception as error:  # it raises whatever its readers raise: OSError, ValueError, KeyError, its own errors
        hint = f"; {ways_out()}" if isinstance(error, ConnectionError) and prefix == DATASETS else ""
        raise failure(f"input_path: {location} cannot be streamed ({first_line(error)}){hint}") from error


def _of_hugging_face(name: str, options: dict) -> Generator[dict, None, None]:
    import datasets

    if not _is_here(name):
        check_dataset(name)
    yield from datasets.load_dataset(name, streaming=True, trust_remote_code=False, **options)


def _is_here(name: str) -> bool:
    """Whether it is a folder, or a reader of files, as `json`: nothing that a hub has."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return name in _PACKAGED_DATASETS_MODULES or Path(name).exists()
