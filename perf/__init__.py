"""Measurement: `python -m perf sweep` times the layer, checks it against the oracle and writes
result rows; other commands of `python -m perf` read them.

A package per concern, each importing from those before it only: `workload` (what is run),
`recording` (how it is kept), `against` (what bounds it and what it is compared with), `running`
(how it is run and timed), `tracing` (one launch in detail), `drawing` (rows as pictures), and
`commands`. `arguments` has what every command line needs.
"""
