"""Should this model be pruned? Pure functions from measurements to lights, a verdict and a capacity sheet."""
