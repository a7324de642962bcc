"""Tables in Markdown and LaTeX, and the HTML page of a report, by the templates beside this file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lipsim.results.tables import Row
from lipsim.utils.files import remove_files, write_csv, write_text

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "ε": r"$\varepsilon$",
    "ℓ": r"$\ell$",
    "∞": r"$\infty$",
    "ν": r"$\nu$",
    "α": r"$\alpha$",
    "λ": r"$\lambda$",
    "σ": r"$\sigma$",
    "τ": r"$\tau$",
    "μ": r"$\mu$",
    "Σ": r"$\Sigma$",
    "×": r"$\times$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_TITLES = {"natural": "Natural score", "vote share": "Vote share"}


def markdown_table(rows: Sequence[Row]) -> str:
    """Rows as a table in Markdown, numbers to the right."""
    return _MARKDOWN.get_template("table.md.jinja").render(rows=rows).rstrip("\n")


def latex_table(rows: Sequence[Row], caption: str, eps: Sequence[str], heading: str) -> str:
    """The layout of LipSim's tables (booktabs, multirow): natural score, then the scores at each ε under one heading.

    Args:
        rows: the first column names the metric, then "natural" and perhaps "vote share", then one column for each of
            ``eps``.
        caption: of the table.
        eps: labels of the budgets.
        heading: above them.
    """
    columns = [column for column in rows[0] if column not in eps]
    headings = [rf"\multirow{{2}}{{*}}{{{escape_latex(_TITLES.get(c, _heading(c)))}}}" for c in columns]
    if eps:
        headings.append(rf"\multicolumn{{{len(eps)}}}{{c}}{{{escape_latex(heading)}}}")
    cells = [[row[column] for column in (*columns, *eps)] for row in rows]
    template = _LATEX_TABLES.get_template("table.tex.jinja")
    return template.render(caption=caption, columns=columns, eps=list(eps), headings=headings, rows=cells)


def _heading(column: str) -> str:
    """A column's name with a capital, unless it begins with a symbol or an abbreviation; the rest is left as it is."""
    word = column.split(" ")[0]
    plain = len(word) > 1 and word.isascii() and word.islower()
    return column[:1].upper() + column[1:] if plain else column


def write_table(folder: Path, name: str, title: str, rows: Sequence[Row]) -> None:
    """Write ``NAME.md``, ``NAME.tex`` (booktabs) and ``NAME.csv`` into a folder."""
    write_text(folder / f"{name}.md", f"{title}:\n\n{markdown_table(rows)}\n")
    write_text(folder / f"{name}.tex", f"% \\usepackage{{booktabs,multirow}}\n\n{latex_table(rows, title, [], '')}\n")
    write_csv(folder / f"{name}.csv", rows[0], (row.values() for row in rows))


def remove_table(folder: Path, name: str) -> None:
    """Remove the files of :func:`write_table`, of a table that an earlier run has written and this one does not."""
    remove_files(folder, [f"{name}.{suffix}" for suffix in ("md", "tex", "csv")])


def html_page(**content: Any) -> str:
    """The page of a report, every text in it escaped; see the template for what it takes."""
    return _HTML.get_template("report.html.jinja").render(content) + "\n"


def run_html(**content: Any) -> str:
    """The page of a training, every text in it escaped; see the template for what it takes."""
    return _HTML.get_template("run.html.jinja").render(content) + "\n"


def escape_latex(text: str) -> str:
    """Text with LaTeX's special characters escaped, in one line."""
    norms = {"ℓ2": r"$\ell_2$", "ℓ∞": r"$\ell_\infty$"}
    parts = re.split(f"({'|'.join(norms)})", text)
    escaped = [norms[part] if part in norms else "".join(_LATEX.get(c, c) for c in part) for part in parts]
    return " ".join("".join(escaped).split())


def _latex_budget(label: str) -> str:
    """``36/255`` as a fraction."""
    numerator, _, denominator = label.partition("/")
    if not numerator.strip().replace(".", "").isdecimal():  # a norm before it, or a name
        norm, _, number = label.rpartition(" ")
        return f"{escape_latex(norm)} {_latex_budget(number)}" if norm else escape_latex(label)
    return rf"$\frac{{{numerator}}}{{{denominator}}}$" if denominator else f"${label}$"


def _environment(filters: Mapping[str, Any], **options: Any) -> Environment:
    loader = PackageLoader("lipsim.results", "templates")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)
    environment.filters.update(filters)
    return environment


_MARKDOWN = _environment({"cell": lambda cell: cell.replace("|", "\\|")})
_HTML = _environment({}, autoescape=True)
_LATEX_TABLES = _environment(
    {
        "latex": escape_latex,
        "budget": _latex_budget,
        "cell": lambda cell: escape_latex(cell) if cell else "--",  # not measured
    },
    # LaTeX has braces of its own.
    block_start_string="<%",
    block_end_string="%>",
    variable_start_string="<<",
    variable_end_string=">>",
    comment_start_string="<#",
    comment_end_string="#>",
)
