"""Write questions and their right answers as chats, for `configs/studies/fine-tuning.yaml`.

    python benchmarks/question_chats.py TASKS OUT

TASKS holds `TASK_validation.jsonl`, which are trained on, and `TASK_test.jsonl`, which are held out, with "query",
"choices" and "gold" in every line. OUT gets `train.jsonl`, `held-out.jsonl` and the chat template `template.jinja`.
"""

import argparse
import json
from pathlib import Path

TASKS = ("sciq", "arc_easy", "openbookqa")
FILES = {"validation": "train.jsonl", "test": "held-out.jsonl"}
TEMPLATE = """\
{% for message in messages %}{% if message['role'] == 'user' %}Question: {{ message['content'] }}
{% else %}Answer: {{ message['content'] }}

{% endif %}{% endfor %}{% if add_generation_prompt %}Answer: {% endif %}
"""


def chats_of(path: Path) -> list[dict[str, list[dict[str, str]]]]:
    """Each line of a task's file as a chat of two messages."""
    chats = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        question = row["query"].strip().removeprefix("Question:").removesuffix("Answer:").strip()
        messages = (("user", question), ("assistant", row["choices"][row["gold"]]))
        chats.append({"messages": [{"role": role, "content": content} for role, content in messages]})
    return chats


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split, name in FILES.items():
        chats = [chat for task in TASKS for chat in chats_of(options.tasks / f"{task}_{split}.jsonl")]
        (options.out / name).write_text("".join(f"{json.dumps(chat)}\n" for chat in chats))
        print(f"{options.out / name}: {len(chats):,} chats")
    (options.out / "template.jinja").write_text(TEMPLATE)


if __name__ == "__main__":
    main()
