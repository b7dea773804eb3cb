"""A machine that executes PTX on a CPU."""
