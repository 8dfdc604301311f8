"""Drawn chests: synthetic patients with findings, masks and reports."""

from medctkit.phantom.registry import REGISTRY, Finding
from medctkit.phantom.report_text import write_report
from medctkit.phantom.study import HOSPITALS, PhantomStudy, generate

__all__ = ["HOSPITALS", "REGISTRY", "Finding", "PhantomStudy", "generate", "write_report"]
