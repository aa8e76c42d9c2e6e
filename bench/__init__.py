"""Benchmarks: every claim about speed and memory as a command."""
