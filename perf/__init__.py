"""Measurement: `python -m perf sweep` times the layer, checks it against the oracle and writes
result rows; other commands of `python -m perf` read them.

One module per concern: `cases` and `routings` (what is run), `timing` (how it is timed), `roofline`
(what bounds it), `baselines`, `experts` and `deepep` (what it is compared with), `results` (how it
is kept), `plan` and `measure` (what to run, and running it), `processes`, `sample` and
`process_runner` (the same with a process per GPU), `sweep` (the command that joins them), `options`
and `progress` (command lines). `compare` judges two result files; `curves`, `plots` and `report`
draw them; `probes` and `ceilings` measure what bounds the layer; `accuracy` compares it with exact
arithmetic; `zeroing` times what it does without and `ablation` the parts of a launch alone; `trace`
records one launch, with `timeline` (its events) and `phases`
(where its time went). `publish` runs published measurements in one go.
"""
