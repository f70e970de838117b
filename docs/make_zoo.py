"""Writes the table of docs/zoo.md anew, from the networks as they are: python docs/make_zoo.py"""

from pathlib import Path

from rnas.files import write_text
from rnas.nets.zoo import zoo_table

PAGE = Path(__file__).with_name("zoo.md")
BEGIN, END = "<!-- table: docs/make_zoo.py -->\n", "<!-- end of table -->\n"


def table() -> str:
    """`zoo_table` in Markdown."""
    lines = ["| Name | Year | Kind | Parameters | MACs (M) | Paper (M) | Source |", "|-|-|-|-:|-:|-:|-|"]
    for row in zoo_table():
        counts = ["–", "–"] if row["macs"] is None else [f"{row['parameters']:,}", f"{row['macs'] / 1e6:.1f}"]
        paper = "–" if row["paper_params_M"] is None else str(row["paper_params_M"])
        source = "; ".join(text for text in (row["source"] or "none", row["note"]) if text)
        lines.append(f"| {row['name']} | {row['year']} | {row['kind']} | {' | '.join(counts)} | {paper} | {source} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The page `text` with its table replaced."""
    head, rest = text.split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))
