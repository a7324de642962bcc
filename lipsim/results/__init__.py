"""What runs measured: results.json, tables, plots and reports."""

from lipsim.results.environment import commit, versions
from lipsim.results.file import eps_label, keep_sections, read_results, update_results
from lipsim.results.schema import SCHEMA

__all__ = ["SCHEMA", "commit", "eps_label", "keep_sections", "read_results", "update_results", "versions"]
