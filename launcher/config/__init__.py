"""The configuration: its sections, the rules between them, and how YAML becomes a `Config`."""
