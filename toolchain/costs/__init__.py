"""What each part of a model costs where it is served: measured by `sentei profile`, used by `sentei prune --target`."""
