"""Detect ranks that are lost, hung or slow, and requests to stop."""
