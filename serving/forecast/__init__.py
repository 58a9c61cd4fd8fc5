"""What a plan promises on a device, and why a measured gain differs from it."""
