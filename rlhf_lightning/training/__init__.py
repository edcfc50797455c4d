"""LightningModules and callbacks. The arithmetic is in `functional`."""
