"""What is measured: models, cases with inputs and weights, routings, the parts of a launch."""
