"""report: one self-contained HTML page about a run.

`collect` reads the artifacts of a run into :class:`ReportFacts`, `write_report` makes the page; the
facts can as well be filled by hand.
"""

from __future__ import annotations

from pipeline.report.collect import ReportConfig, collect
from pipeline.report.facts import ReportFacts
from pipeline.report.page import write_report

__all__ = ["ReportConfig", "ReportFacts", "collect", "write_report"]
