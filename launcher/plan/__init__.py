"""The steps, rates, strengths, memory and traffic that a configuration resolves to; no engine, no ranks."""
