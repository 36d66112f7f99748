"""Ranks that are lost, hung, slow or asked to stop."""
