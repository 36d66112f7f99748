"""A run as people look at it: history, tables, plots, the HTML report and the status."""
