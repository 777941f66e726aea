"""Publish a model on Hugging Face or ModelScope, with a model card.

python -m model.publish out --to hf:OWNER/NAME --license apache-2.0 --dry_run   # look at the card first
python -m model.publish out --to hf:OWNER/NAME --license apache-2.0             # the best weights of a run
python -m model.publish my_model --to ms:OWNER/NAME                             # a folder that model.convert wrote

The files are listed, and sent once you have agreed; the repository is private unless you say --public.
"""

import dataclasses
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from model.command import CommandParser, path_flag, run_command, say
from model.convert import convert, describe
from model.errors import InputError, counted, shown
from model.hubs.huggingface import HuggingFace
from model.hubs.modelscope import ModelScope
from model.publish.card import Publication, license_of, model_card
from model.publish.history import History, read_history
from model.storage.files import check_is_new, size_text
from model.storage.newest_weights import newest_weights
from model.weights import load_weights
from model.weights.find import find_weights
from model.weights.tokenizer_copy import check_links
from model.weights.transformers_folder import is_transformers

HUBS = {hub.prefix: hub for hub in (HuggingFace, ModelScope)}
CARD = "README.md"
MOST_OF_NAME = 96  # characters of OWNER/NAME; the rules for names are Hugging Face's
# What a folder of transformers may hold: nothing else is sent, no checkpoint, no data, no hidden file.
SENT = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|merges\.txt|tokenizer\.model|chat_template\.jinja|model[\w-]*\.safetensors(\.index\.json)?"
    r"|README\.md|(LICENSE|NOTICE)(\.\w+)?"
)


def publish(
    folder: str | Path,
    publication: Publication,
    is_public: bool = False,
    agreed: bool = False,
    dry_run: bool = False,
) -> bool:
    """Make the model card and the folder for transformers, and send them once the user agrees.

    Args:
        folder: a run's folder, whose best weights are taken, or a folder of transformers.
        agreed: do not ask.
        dry_run: write the card and the folder, and send nothing.

    Returns:
        whether the user agreed, or need not.

    Raises:
        InputError: the folder has no weights, the hub refuses or does not answer, or nobody can be asked.
    """
    folder, where = Path(folder), f"{publication.hub}:{publication.repository}"
    weights_path = _find(folder)
    is_converted = weights_path.is_dir()
    if is_converted and (folder / CARD).is_file():
        publication = _as_the_card_says(folder / CARD, publication)
    if dry_run:
        return _write(folder, weights_path, publication)
    if not agreed and not sys.stdin.isatty():
        raise InputError(f"{where}: nobody to ask whether to send, since there is no terminal; give --yes")
    hub = HUBS[publication.hub]()
    hub.check_account(publication.repository)
    found, wanted = hub.visibility(publication.repository), "public" if is_public else "private"
    if found not in (None, wanted):
        remedy = "give --public to update it" if found == "public" else "omit --public, or change that in its settings"
        raise InputError(f"{where}: a {found} repository exists, {wanted} expected; {remedy}, or give another name")
    with tempfile.TemporaryDirectory(
        prefix=".publish_", dir=folder if is_converted else weights_path.parent
    ) as temporary:
        staged = Path(temporary) / publication.name
        _stage(weights_path, staged, publication)
        files = sorted(staged.iterdir())
        for file in files:
            say(f"    {file.name:<28} {size_text(file.stat().st_size):>10}")
        total = size_text(sum(file.stat().st_size for file in files))
        what = f"{counted(len(files), 'file')}, {total}, to {hub.endpoint}/{publication.repository}"
        state = f"{wanted}, license {publication.license}, {'new' if found is None else 'replacing what is there'}"
        if not agreed and not _asked(f"send {what} ({state})? [y/N] "):
            say("nothing was sent")
            return False
        say(f"sending {what} ({state})")
        if found is None:
            hub.create(publication.repository, not is_public, publication.license)
        say(f"published: {hub.send(publication.repository, staged)}")
    return True


def _find(folder: Path) -> Path:
    """The weights to publish: a run's best ones, else its newest; or the folder itself, if it is one of transformers.

    Raises:
        InputError: there are none.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {found}; expected a run's out_dir, or what model.convert --to transformers wrote")
    if is_transformers(folder):
        if not any(folder.glob("model*.safetensors")):
            raise InputError(f"{folder}: no model.safetensors in it; write one: python -m model.convert {folder} NEW")
        return folder
    if (folder / "best_model.pth").is_file():
        return folder / "best_model.pth"
    if newest_weights(folder) is None:
        raise InputError(
            f"{folder}: no weights in it; expected a run's out_dir, or what model.convert --to transformers wrote"
        )
    found, choice = find_weights(folder)
    say(choice)
    return found


def _as_the_card_says(card: Path, publication: Publication) -> Publication:
    """The publication with the license of a card that is there.

    Raises:
        InputError: --license names another one.
    """
    found = license_of(card.read_text(encoding="utf-8", errors="replace")) or "unknown"
    if publication.license not in ("unknown", found):
        raise InputError(f"{card} says license {found}, --license {publication.license} was given; change one of them")
    return dataclasses.replace(publication, license=found)


def _write(folder: Path, weights_path: Path, publication: Publication) -> bool:
    """Write what would be sent: a run's into `publish/NAME` in its folder, otherwise the card into the folder."""
    if weights_path.is_dir():
        target = folder / CARD
        if target.exists():
            say(f"{target}: there already, left as it is; nothing sent")
            return True
        target.write_text(_card_of_folder(folder, publication), encoding="utf-8")
    else:
        target = folder / "publish" / publication.name
        check_is_new(target)
        _stage(weights_path, target, publication)
    say(f"{target}: written, nothing sent; edit the card if you like, then publish the folder")
    return True


def _stage(weights_path: Path, target: Path, publication: Publication) -> None:
    """Make the folder to send.

    Raises:
        InputError: a file to send is damaged, or a link out of its folder.
    """
    if not weights_path.is_dir():
        weights = convert(weights_path, target, to="transformers", say=lambda line: None)
        say(f"{weights_path}: {describe(weights)}")
        _say_license(publication)
        card = model_card(publication, weights, read_history(weights_path))
        (target / CARD).write_text(card, encoding="utf-8")
        return
    folder = weights_path
    names = sorted(path.name for path in folder.iterdir())
    sent = [name for name in names if SENT.fullmatch(name) and (folder / name).is_file()]
    check_links(folder, sent)
    if skipped := [name for name in names if name not in (*sent, target.parent.name)]:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        say(f"not sent: {', '.join(skipped[:5])}{more}")
    target.mkdir()
    for name in sent:
        _link(folder / name, target / name)
    if (folder / CARD).is_file():
        say(f"the card is {folder / CARD}, as it is")
        load_weights(folder)  # raises where they are damaged
    else:
        (target / CARD).write_text(_card_of_folder(folder, publication), encoding="utf-8")


def _say_license(publication: Publication) -> None:
    if publication.license == "unknown":
        say("no --license: the card says that the license is unknown, so that others should not use the model")


def _card_of_folder(folder: Path, publication: Publication) -> str:
    weights = load_weights(folder)
    say(f"{folder}: {describe(weights)}")
    say("a folder of transformers does not say what it was trained on; publish the run's out_dir, and the card does")
    _say_license(publication)
    return model_card(publication, weights, History())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)  # of a link, as in the Hugging Face cache, its file
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def _asked(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def destination(text: str) -> tuple[str, str]:
    """("hf", "OWNER/NAME") of hf:OWNER/NAME.

    Raises:
        InputError: it is written in another way, or hubs refuse the name.
    """
    hub, _, repository = text.partition(":")
    if hub not in HUBS or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository, re.ASCII):
        raise InputError(f"--to: {shown(text)} found, hf:OWNER/NAME or ms:OWNER/NAME expected")
    if len(repository) > MOST_OF_NAME or re.search(r"--|\.\.|[.-](/|$)|\.git$", repository):
        raise InputError(
            f"--to: {shown(text)} found, at most {MOST_OF_NAME} characters expected, without -- or .., and without -, ."
            " or .git at the end"
        )
    return hub, repository


def main() -> int:
    """The command line."""
    parser = CommandParser(prog="python -m model.publish", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=path_flag, help="a run's out_dir, or a folder of transformers")
    parser.add_argument("--to", required=True, metavar="HUB:OWNER/NAME", help="hf:OWNER/NAME or ms:OWNER/NAME")
    parser.add_argument(
        "--license", default="unknown", metavar="NAME", help="as hubs name it, for example apache-2.0 [unknown]"
    )
    parser.add_argument("--public", action="store_true", help="for everybody to see; default: only for you")
    parser.add_argument("--yes", action="store_true", help="send without asking")
    parser.add_argument("--dry_run", action="store_true", help="write the card and the folder here, and send nothing")
    arguments = parser.parse_args(sys.argv[1:])
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", arguments.license, re.ASCII):
        raise InputError(f"--license: {shown(arguments.license)} found, a name such as apache-2.0 expected")
    publication = Publication(*destination(arguments.to), license=arguments.license)
    agreed = publish(arguments.folder, publication, arguments.public, arguments.yes, arguments.dry_run)
    return 0 if agreed else 1


if __name__ == "__main__":
    run_command(main)
