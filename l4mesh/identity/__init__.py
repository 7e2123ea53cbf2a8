"""Certificates: reading and judging those that we are given, and a CA that makes them."""
