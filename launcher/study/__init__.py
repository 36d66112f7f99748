"""Jobs for Slurm: templates, a site's settings, and submission."""
