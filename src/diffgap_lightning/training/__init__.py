"""Training a refiner with Lightning; nothing here is needed to use one."""
