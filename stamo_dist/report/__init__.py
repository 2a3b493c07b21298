"""One self-contained HTML page about one or several runs."""

from stamo_dist.report.page import write_report

__all__ = ["write_report"]
