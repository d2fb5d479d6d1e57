"""Write the table of methods into README.md from what the methods declare of themselves.

python docs/method_table.py          rewrite the table
python docs/method_table.py --check  fail if it is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

import foveate
from foveate.registry import method_class

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
TRAINING = {"none": "works as it is", "recommended": "recommended", "required": "required"}
HOOKS = {
    ("before",): "before a block",
    ("between",): "between attention and MLP",
    ("after",): "after a block",
}
NEEDS = {
    "cls_row": "class attention",
    "key_direction": "keys",
    "value_norm": "value lengths",
    "full_map": "the attention map",
}


def table(link: str = "foveate/methods/{name}.py") -> str:
    """The table as Markdown, with links to a file or page for each method."""
    lines = [
        "| method | what it does | acts | reads | training | count | paper |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in foveate.list_methods():
        cls = method_class(name)
        method = cls()
        acts = HOOKS.get(cls.hooks, "around blocks")
        needs = ", ".join(NEEDS[need] for need in sorted(method.reads)) or "-"
        count = "fixed" if method.fixed_count else "per image"
        lines.append(
            f"| [`{name}`]({link.format(name=name)}) | {cls.summary} | {acts} | {needs} "
            f"| {TRAINING[cls.training_need]} | {count} | {cls.paper} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Rewrite the table, or compare."""
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    new = f"{head}{BEGIN}\n{table()}\n{END}{tail}"
    if "--check" in sys.argv[1:]:
        if new != text:
            print("README.md: the table of methods is out of date; run docs/method_table.py")
            return 1
        return 0
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
