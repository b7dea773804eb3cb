"""One launch as a timeline, and where its time went."""
