"""Running a plan, in one process or with one per GPU: options, timing, checking, printing."""
