"""Show a run: history, tables, plots, the HTML report and the status."""
