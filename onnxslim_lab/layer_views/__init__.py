"""How each kind of weighted node is seen as a matrix."""
