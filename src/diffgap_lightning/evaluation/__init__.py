"""Comparing refiners with the closed-form rivals: measurements with intervals, the table, the report."""
