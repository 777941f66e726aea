"""What train.py says of the token file that it is given, and of one that changes while it trains."""

import os
import shutil

import pytest

import train
from model.errors import InputError
from model.storage.archive import load_torch
from model.token_file.manifest import learn_path, manifest_path
from model.training.settings import Settings, build_settings
from optimized_pretrain import Trainer
from tests import forks
from tests.chat_files import CHATS, write_chats
from tests.conftest import corpus_lines
from tests.tiny_runs import (
    HUNG,
    ONE_THREAD,
    assert_same_end,
    command,
    exit_code_here,
    losses,
    mostly,
    wait_for,
)
from tests.tiny_runs import (
    train as train_here,
)
from utils import Processes


def test_an_existing_token_file_says_what_it_was_made_from(tmp_path, capsys):
    (tmp_path / "poems.jsonl").write_bytes(b"".join(corpus_lines(40)))
    settings = Settings()
    settings.data.train_data_path, settings.data.raw_data_path = str(tmp_path / "t.bin"), str(tmp_path / "poems.jsonl")
    train.prepare_data_if_missing(settings)
    capsys.readouterr()

    train.prepare_data_if_missing(settings)
    message = capsys.readouterr().err
    assert f"{tmp_path / 't.bin'}, " in message and "tokens of poems.jsonl" in message and "warning" not in message

    with open(tmp_path / "poems.jsonl", "ab") as file:
        file.write(corpus_lines(41)[-1])
    train.prepare_data_if_missing(settings)
    message = capsys.readouterr().err
    assert "poems.jsonl is not read, since" in message and "was made before that was changed" in message

    settings.data.raw_data_path = str(tmp_path / "mine.jsonl")
    train.prepare_data_if_missing(settings)
    message = capsys.readouterr().err
    assert "mine.jsonl is not read, since" in message and "was made from other data" in message


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="Windows shortens no file that is mapped")
@pytest.mark.parametrize("kind", mostly(["texts", "chats"], slow=["chats"]))
def test_a_token_file_shortened_in_place_ends_the_run_in_one_line_and_a_restored_one_resumes_it(
    kind, flags, tmp_path, token_file, tokenizer_folder, capfd
):
    path = tmp_path / "mine.bin"
    if kind == "chats":
        write_chats(path, CHATS, tokenizer_folder)
        given, shortened = flags(train_data_path=path, max_seq_len=96, max_steps=5000), learn_path(path)
    else:
        shutil.copy(token_file, path)
        shutil.copy(manifest_path(token_file), manifest_path(path))
        given, shortened = flags(train_data_path=path, max_steps=5000), path
    whole = shortened.read_bytes()
    process = forks.Popen(command(given), stderr=-1, stdout=-1, encoding="utf-8", env=ONE_THREAD)
    wait_for((tmp_path / "out" / "checkpoint_step_4.pth").exists, process)
    os.truncate(shortened, 0)  # of which no page is left
    _, said = process.communicate(timeout=HUNG)
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    expected = f"error: {shortened}: 0 bytes found, {len(whole):,} when it was opened: another program shortened it"
    assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith(expected), said
    assert "Traceback" not in said
    saved = load_torch(tmp_path / "out" / "checkpoint_interrupted.pth")["progress"]["step"]
    assert saved == len(losses(tmp_path / "out")) >= 4

    shortened.write_bytes(whole)
    assert exit_code_here(given | {"max_steps": str(saved + 2)}, "--resume") == 0
    assert f"checkpoint_interrupted.pth at step {saved}" in capfd.readouterr().err


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="Windows shortens no file that is mapped")
@pytest.mark.parametrize("read", [1, 13, "the held-out samples"])  # the first micro-batch, the second of a step
def test_a_run_whose_file_is_shortened_keeps_every_step(read, flags, tmp_path, token_file):
    path = tmp_path / "mine.bin"
    for source, copy in ((token_file, path), (manifest_path(token_file), manifest_path(path))):
        shutil.copy(source, copy)
    given = {"train_data_path": path, "accumulation_steps": 2, "dropout": 0.1, "use_ema": "true", "save_interval": 12}
    train_here(flags(out_dir=tmp_path / "whole", **given))
    whole, trainer, batches = path.read_bytes(), Trainer(build_settings({}, flags(**given)), Processes()), []
    objective, evaluate = trainer.objective, trainer.evaluate
    read_batch = objective.read

    def read_noted(*given):
        batches.append(given)
        if len(batches) == read:
            os.truncate(path, 0)
        return read_batch(*given)

    def evaluate_shortened(model):
        os.truncate(path, 0)
        return evaluate(model)

    if isinstance(read, int):
        objective.read = read_noted
    else:
        trainer.evaluate = evaluate_shortened
    with pytest.raises(InputError, match="another program shortened it meanwhile"):
        trainer.train()
    path.write_bytes(whole)
    assert train_here(flags(resume="true", **given)).outcome == "finished"
    assert_same_end(tmp_path / "whole", tmp_path / "out")
    assert losses(tmp_path / "whole") == losses(tmp_path / "out")
