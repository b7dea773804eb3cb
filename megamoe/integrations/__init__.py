"""The layer inside engines that others wrote: a module per engine, which imports it."""
