"""`lit-symopt study`: a grid of families and contenders, with a search of rates and repeated final runs."""
