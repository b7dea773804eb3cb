"""What the layer is held against: baselines, the roofline and its ceilings, figures of peers."""
