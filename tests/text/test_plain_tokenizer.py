"""The tokenizer without transformers is the one that transformers loads."""

import json
import random
import shutil

import pytest
from transformers import PreTrainedTokenizerFast

from model.errors import InputError
from model.text.chat_template import encode_chat
from model.text.plain_tokenizer import PlainTokenizer
from model.text.token_bytes import token_bytes
from model.text.tokenization import (
    EMBEDDED_TOKENIZER,
    control_ids,
    delimiters,
    encode_texts,
    end_ids,
    load_tokenizer,
    open_tokenizer,
    vocabulary_size,
)

TEXTS = ["春眠不觉晓，处处闻啼鸟。", "夜来 Windy 🤔 </s> 花落<unk>知多少？\r\n", "", "<s>user\n12345 \ufffd"]
ATTRIBUTES = (
    "name_or_path bos_token bos_token_id eos_token eos_token_id unk_token unk_token_id special_tokens_map"
    " chat_template added_tokens_decoder all_special_ids"
).split()


@pytest.fixture(params=["embedded", "with an end", "another template", "no template"])
def folder(request, tmp_path):
    shutil.copytree(EMBEDDED_TOKENIZER, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    if request.param == "with an end":
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    elif request.param == "another template":
        config["chat_template"] = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}{{ unk_token }}"
    elif request.param == "no template":
        del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def test_it_is_the_one_that_transformers_loads(folder):
    plain, whole = open_tokenizer(folder), load_tokenizer(folder)
    assert isinstance(plain, PlainTokenizer) and isinstance(whole, PreTrainedTokenizerFast)
    assert [getattr(plain, name) for name in ATTRIBUTES] == [getattr(whole, name) for name in ATTRIBUTES]
    assert len(plain) == len(whole) and plain.get_vocab() == whole.get_vocab()
    for found in (control_ids, delimiters, end_ids, vocabulary_size):
        assert found(plain) == found(whole)
    assert encode_texts(plain, TEXTS) == encode_texts(whole, TEXTS)
    ids = [0, 1, 2, *random.Random(1).sample(range(len(whole)), 500)]
    assert plain.decode(ids) == whole.decode(ids)
    assert plain.convert_ids_to_tokens(ids) == whole.convert_ids_to_tokens(ids)
    for plains, wholes in zip(vars(token_bytes(plain)).values(), vars(token_bytes(whole)).values(), strict=True):
        assert plains.tolist() == wholes.tolist()
    if plain.chat_template:
        history = [{"role": "user", "content": text} for text in TEXTS]
        assert encode_chat(plain, history) == encode_chat(whole, history)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"pad_token": "春"}),
        ("tokenizer_config.json", {"clean_up_tokenization_spaces": True}),
        ("special_tokens_map.json", {"cls_token": "春"}),
        ("added_tokens.json", {"<s>": 1}),  # repeats it; another token is refused
        ("chat_template.jinja", {}),
    ],
)
def test_what_is_configured_otherwise_is_left_to_transformers(tmp_path, file, content):
    shutil.copytree(EMBEDDED_TOKENIZER, tmp_path, dirs_exist_ok=True)
    path = tmp_path / file
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(before | content), encoding="utf-8")
    assert isinstance(open_tokenizer(tmp_path), PreTrainedTokenizerFast)


@pytest.mark.parametrize("damage", ["no JSON", "no model", "no tokens", "names unknown tokens"])
def test_a_damaged_one_is_refused_in_the_same_words(tmp_path, damage):
    shutil.copytree(EMBEDDED_TOKENIZER, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if damage == "no model":
        content["model"] = None
    elif damage == "no tokens":
        content["model"] |= {"vocab": {}, "merges": []}
        content["added_tokens"] = []
    elif damage == "names unknown tokens":
        content["added_tokens"] = []
    path.write_text("{" if damage == "no JSON" else json.dumps(content), encoding="utf-8")
    outcomes = []
    for load in (open_tokenizer, load_tokenizer):
        try:
            outcomes.append(load(tmp_path).get_vocab())
        except InputError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
