"""Several methods on the same data: which arms, what each costs, and how they compare."""
