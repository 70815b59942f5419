"""A report as Markdown and as CSV."""

from __future__ import annotations

import csv
import io

from llmco2_vllm.reporting.report import Report, Table, tables

COLUMNS = ("day", "model", "figure", "unit", "value", "missing_hours")


def markdown(report: Report) -> str:
    """Tables and lists, in the Markdown of GitHub."""
    parts = ["# Carbon report", f"{report.period}. Source: {_text(report.source)}."]
    parts += [f"**{_text(line)}**" for line in report.cautions]
    parts += [_table(table) for table in tables(report)]
    parts.append("## Method\n\n" + "\n".join(f"- **{name}**: {_text(words)}" for name, words in report.methods))
    for title, lines in (("Notes", report.notes), ("Not known", report.unknown)):
        if lines:
            parts.append(f"## {title}\n\n" + "\n".join(f"- {_text(line)}" for line in lines))
    return "\n\n".join(parts) + "\n"


def tidy_csv(report: Report) -> str:
    """One figure a row, in full; an unknown one has no value. ``all`` is the sum over days, or over models."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for figure in report.figures:
        value = "" if figure.value is None else repr(figure.value)
        writer.writerow((figure.day, figure.model, figure.name, figure.unit, value, figure.missing_hours))
    return file.getvalue()


def _table(table: Table) -> str:
    lines = [table.head, [":--", *["--:"] * (len(table.head) - 1)], *table.rows]
    rows = "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines)
    return f"## {table.title}\n\n{_text(table.caption)}\n\n{rows}"


def _text(words: str) -> str:
    """Without what would end a cell or begin a tag."""
    return " ".join(words.replace("|", "\\|").replace("<", "&lt;").split())
