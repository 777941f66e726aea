"""The output file of a batch: what it resumes from, and what it refuses to overwrite."""

import json

import pytest

from model.errors import InputError
from model.generation.batch_results import open_results, write_result

PROMPTS = [(1, "中国"), (2, "春风"), (3, "长江")]
FIRST = '{"prompt": "中国", "text": "长城"}\n'.encode()


@pytest.mark.parametrize("rest", ["", '{"pro', '{"prompt": "春', '{"prompt": "春风", "text": "又绿'])
def test_a_line_in_which_a_batch_was_interrupted_is_written_again(tmp_path, rest):
    path = tmp_path / "results.jsonl"
    path.write_bytes(FIRST + rest.encode())
    done, failed, file = open_results(path, PROMPTS, resume=True)
    with file:
        write_result(file, {"prompt": "春风", "error": "too long"})
    assert (done, failed) == (1, 0)
    assert path.read_bytes() == FIRST + '{"prompt": "春风", "error": "too long"}\n'.encode()
    assert open_results(path, PROMPTS, resume=True)[:2] == (2, 1)


@pytest.mark.parametrize(
    "content",
    [
        b"my only notes, no newline at end", b'{"a": 1}', bytes(range(256)), b'{"prompt": "', b"notes\r\r\r",
        FIRST + b"and a note", FIRST + '{"prompt": "春风"}\n'.encode(),
        FIRST + '{"prompt": "春风", "text": 5}\n'.encode(), FIRST * 2, b"[1]\n", b"\n",
    ],
)  # fmt: skip
def test_what_is_no_result_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    prompts = PROMPTS if content != b'{"prompt": "' else []
    with pytest.raises(InputError, match="of .*notes is (no result of a batch|a result of another prompt)"):
        open_results(path, prompts, resume=True)
    assert path.read_bytes() == content


def test_results_are_resumed_from_a_regular_file_alone(tmp_path):
    with pytest.raises(InputError, match="no regular file"):
        open_results(tmp_path, PROMPTS, resume=True)


def test_a_line_end_within_a_text_is_no_end_of_a_result(tmp_path):
    path, results = tmp_path / "r", [{"prompt": prompt, "text": "a\u2028b\u0085c\r"} for _, prompt in PROMPTS]
    path.write_bytes(b"".join(json.dumps(result, ensure_ascii=False).encode() + b"\n" for result in results))
    assert open_results(path, PROMPTS, resume=True)[:2] == (3, 0)
