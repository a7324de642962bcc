"""What runs measured: results.json, tables, plots and reports."""

from lipsim.results.file import SCHEMA, commit, eps_label, keep_sections, read_results, update_results, versions

__all__ = ["SCHEMA", "commit", "eps_label", "keep_sections", "read_results", "update_results", "versions"]
