"""Makes pairs_zh.jsonl: questions with two answers, of which the friendly one and the brief one is preferred.

python examples/pairs_zh.py > examples/pairs_zh.jsonl
"""

import json

GREETINGS = {"你好": ("你好！", "干嘛"), "谢谢": ("不客气。", "哦"), "再见": ("再会", "走"), "早": ("早！", "困")}
CAPITALS = {"中国": "北京", "法国": "巴黎", "日本": "东京", "英国": "伦敦", "德国": "柏林", "意大利": "罗马"}
LINES = {"床前明月光": "疑是地上霜", "白日依山尽": "黄河入海流", "春眠不觉晓": "处处闻啼鸟", "锄禾日当午": "汗滴禾下土"}


def main() -> None:
    """Print one pair a line."""
    for question, (chosen, rejected) in GREETINGS.items():
        print_pair(question, chosen, rejected)
    asked = [(f"{country}的首都是哪里？", f"{city}。") for country, city in CAPITALS.items()]
    asked += [(f"“{line}”的下一句是什么？", f"{following}。") for line, following in LINES.items()]
    asked += [(f"{a}+{b}等于几？", f"{a + b}。") for a in range(1, 6) for b in range(a, 6)]
    for question, answer in asked:
        wordy = f"这个问题问得很好。让我想一想，我觉得答案可能是{answer}希望对你有帮助！"
        print_pair(question, answer, wordy)


def print_pair(question: str, chosen: str, rejected: str) -> None:
    """Print a line of JSON."""
    print(json.dumps({"prompt": question, "chosen": chosen, "rejected": rejected}, ensure_ascii=False))


if __name__ == "__main__":
    main()
