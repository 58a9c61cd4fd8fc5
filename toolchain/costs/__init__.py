"""What each part of a model costs where it is served: `sentei profile` measures it, `sentei prune --target` spends it."""
